"""Products of quantized weights with few rows an expert: weights pass once through registers, in the order in which
memory holds them, and tokens follow their order. In Gluon.
"""
