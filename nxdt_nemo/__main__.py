"""`python -m nxdt_nemo ...` is `nxdt-nemo ...`; torchrun starts ranks this way. Proof: tests/cli/test_run.py."""

from nxdt_nemo.cli.main import main

if __name__ == "__main__":
    main()
