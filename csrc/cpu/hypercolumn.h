// What other operators use of hypercolumn; specified in moe_kernels/ops/hypercolumn.py.
#pragma once

#include <vector>

#include "common.h"

namespace moe_kernels {

// (B, H, W) float32 or float64: the norms of all hypercolumns.
Tensor hypercolumn_norm(std::vector<Tensor> maps, std::vector<int64_t> grid);
// The same of their squares.
Tensor hypercolumn_square(const std::vector<Tensor>& maps, const std::vector<int64_t>& grid);

}  // namespace moe_kernels
