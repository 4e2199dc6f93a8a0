"""The meaning of every operator, in plain PyTorch: any device, any floating dtype, float64 too."""
