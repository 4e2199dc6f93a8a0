// Vectors of the compiler's own kind. Included once for each instruction set (for_each_isa.h), so there is no guard.

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(MOE_VECTOR_BYTES)));
  typedef A unaligned __attribute__((vector_size(MOE_VECTOR_BYTES), aligned(alignof(A)), may_alias));
};
template <class A>
constexpr int64_t kLanes = MOE_VECTOR_BYTES / sizeof(A);
