"""``python -m compile_moe``: the same as the console script ``compile-moe``."""

from compile_moe.cli import main

if __name__ == "__main__":
    main()
