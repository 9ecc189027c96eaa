"""The linear layer on 8-bit operands, its kernels, and the choice between them."""
