"""These files run real kernels under Triton's interpreter; ``tests/test_interpreted.py`` starts them."""

from tests.support.interpreter import is_interpreting, repair

if is_interpreting():
    repair()
else:
    # The switch is read when kernels are decorated: this process has, or will have, compiled ones.
    collect_ignore_glob = ["test_*.py"]
