"""The experts of one token, without a token sort.

A token's experts are read whole, once, so that each weight takes one multiplication: ordinary units do it as fast as
memory gives weights, and what counts is that loads start early, never pause, and end together.
"""
