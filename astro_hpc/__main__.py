"""`python -m astro_hpc` is `astro-hpc`."""

from astro_hpc.cli import main

if __name__ == "__main__":
    main()
