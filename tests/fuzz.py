"""Fuzzes one parser, guided by which of its code the bytes reach: `python -m tests.fuzz TARGET CORPUS [options]`.

Ends as the first input raises, and writes it down. TARGET is one of tests/fuzz_targets.py, the options are libFuzzer's.
"""

import sys

import atheris

with atheris.instrument_imports(include=["web", "mail", "smtp", "waitress", "email_validator"]):
    from tests.fuzz_targets import TARGETS

atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
atheris.Fuzz()
