"""`python -m refreshkv NAME ...` is the console command `refreshkv NAME ...`."""

from refreshkv.launch.command import main

if __name__ == "__main__":
    main()
