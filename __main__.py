"""python -m tiltune"""

from .launch.cli import main

main()
