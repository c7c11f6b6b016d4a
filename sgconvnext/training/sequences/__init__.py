"""Tasks of long range dependency, made by the thousand or read from Long Range Arena's files."""
