"""GEMMs on quantized weights, dequantized where they are loaded; a scheme brings the functions that do it."""
