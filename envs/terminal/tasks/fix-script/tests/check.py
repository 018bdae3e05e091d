"""Exit status 0 if the script adds up files that it has never seen."""

import os
import random
import subprocess
import sys
import tempfile


def answer(text: str) -> str:
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    done = subprocess.run(
        ["/bin/sh", "/app/sum.sh", file.name], capture_output=True, text=True, timeout=10, user=65534, group=65534
    )
    return done.stdout.strip()


rng = random.SystemRandom()
for n in (0, 1, 5, 40):
    numbers = [rng.randrange(-999, 999) for _ in range(n)]
    try:
        if answer("".join(f"{x}\n" for x in numbers)) != str(sum(numbers)):
            sys.exit(1)
    except (OSError, subprocess.SubprocessError, ValueError):
        sys.exit(1)
