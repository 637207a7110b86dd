"""The experts of one token on weights of 4 and 8 bits, without a token sort: decoded in registers, for tensor cores."""
