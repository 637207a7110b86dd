"""One quantization scheme a file; every file here is imported and registers its class."""
