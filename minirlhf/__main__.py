"""python -m minirlhf is minirlhf."""

from minirlhf.app.cli import main

if __name__ == "__main__":
    main()
