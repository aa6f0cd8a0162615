"`python -m polyp_difom`: the command line."
from polyp_difom.cli import main

if __name__ == '__main__': main()
