"""The two GEMMs for many rows an expert on Hopper: warp-specialized persistent kernels, in Gluon, on 16-bit numbers,
8-bit floating point, and weights that are stored in 4 or 8 bits.

Both compute the product transposed: the left operand of the tensor cores is 64 weight rows for each of two consumer
warpgroups, or twice 64, the right one up to 256 tokens, or 128, which can be any multiple of 8. So a tile can have a
tail: an expert with a few rows more than a multiple of that doesn't pay for another tile, and its weights are read
once. One producer warpgroup fills a ring of buffers: weights by the tensor memory accelerator (TMA), tokens gathered by
pointers (GEMM 1) or by TMA too (GEMM 2). Weights that are multiplied in another form than they are stored in are
decoded by the consumers, in registers, each once for all tokens of a tile. Programs take tiles as they get ready, by a
counter in the list.
"""
