"""Spoken words of a second each: Speech Commands (arXiv 1804.03209), and a synthesised set in the same files.

    Speech("/data/speech_commands_v0.02", "train", words=SC10)

Where Speech Commands is not at hand, espeak-ng says the words (apt-get install espeak-ng; 1.51 in Debian 12):

    python -m sgconvnext.training.sequences.speech OUT --samples-per-word 220 --seed 0
"""

import argparse
import io
import math
import shutil
import subprocess
import wave
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from ... import console
from ...errors import DataError, one_line, shortened

Signal = np.ndarray[Any, np.dtype[np.float64]]

PROGRAM = "python -m sgconvnext.training.sequences.speech"
RATE = 16000  # Hz, of all files; a file holds at most a second
SC10 = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")  # in the order of S4's classes
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}  # what neither names is for training
SPLITS = ("train", *LISTS)

ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029")
VOICES = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4")  # espeak-ng's variants, each a throat
HELD_OUT = {"validation": ("m3", "f2"), "test": ("m6", "f4")}
SPEED, PITCH = (110, 230), (20, 80)  # words per minute, of which espeak-ng's own is 175; of 0 to 99, its own is 50
SNR_DB, LEVEL = (0.0, 30.0), (0.1, 0.9)  # of the speech against the noise; the file's peak
NOISE_SLOPE = (0.0, 2.0)  # power falls by f^-slope: white to brown
SILENT = 0.01  # of the peak; what is below at both ends is cut off


class Speech(Dataset[tuple[Tensor, int]]):
    """Waveforms and their words, from folders called as the words and the two lists of files that are held out.

    An item is (waveform, class): float32 (1, length * rate / 16000) from -1 to 1, not normalised any further; and the
    place of its word in ``words``. Short files get zeros at the end, long ones lose theirs. Of Speech Commands 0.02
    the lists are used for ten words too, where S4 draws 70, 15 and 15 % of the files that last a whole second.

    At a lower rate every (16000 / rate)th sample is taken, from the first on, and nothing is filtered: so S4 tests
    whether a model trained at 16 kHz works at 8 kHz (arXiv 2111.00396; ``subsample`` in its loader sc.py).

    Args:
        root: the folder that holds the words' folders. ``_background_noise_`` and hidden ones are no words.
        split: "train", "validation" or "test".
        words: the classes; None for all folders in alphabetical order, 35 in Speech Commands 0.02.
        rate: in Hz, a divisor of 16000.
        length: in samples at 16 kHz.

    Raises:
        ValueError: the root, a word's folder, a list or a listed file is missing; a file is in both lists; the split
            is empty or unknown; words has one twice; rate is no divisor.
        DataError: an item's file is no wav file of 16 kHz, 16 bits and one channel, is cut off, or is empty.
    """

    def __init__(
        self, root: str, split: str, words: Sequence[str] | None = None, rate: int = RATE, length: int = RATE
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")
        if rate < 1 or RATE % rate:
            raise ValueError(f"rate={rate} must divide {RATE}; use {RATE // 2}")
        self.root, self.step, self.length = Path(root), RATE // rate, length
        self.words = _folders(self.root) if words is None else _unique(words)
        self.class_to_idx = {word: index for index, word in enumerate(self.words)}
        self.files = _files(self.root, split, self.words)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        waveform = read_wav(self.root / file)[: self.length]
        waveform = pad(waveform, (0, self.length - len(waveform)))
        return waveform[None, :: self.step], self.class_to_idx[file.partition("/")[0]]


def read_wav(path: Path) -> Tensor:
    """float32 (samples,): the file's integers / 2^15.

    Raises:
        DataError: it is no wav file of 16 kHz, 16 bits and one channel, is cut off, or is empty.
    """
    try:
        with wave.open(str(path)) as file:
            form = file.getframerate(), 8 * file.getsampwidth(), file.getnchannels()
            stated, content = file.getnframes(), file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path} is no wav file that can be read: {one_line(error)}") from error
    if form != (RATE, 16, 1):
        raise DataError(
            f"{path} has {form[0]} Hz, {form[1]} bits and {form[2]} channels, not {RATE} Hz, 16 bits and 1 channel; "
            f"convert it with sox IN -r {RATE} -b 16 -c 1 OUT"
        )
    if len(content) != 2 * stated or not content:
        raise DataError(f"{path} holds {len(content)} bytes of sound, but its header says {2 * stated}")
    return torch.from_numpy(np.frombuffer(content, "<i2").astype(np.float32)) / 2**15


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder; name the one that holds a folder for each word")
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")


def _unique(words: Sequence[str]) -> list[str]:
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ValueError(f"words has {shortened(twice)} twice; name each once")
    return list(words)


def _files(root: Path, split: str, words: list[str]) -> list[str]:
    """``word/name.wav`` of a split, in the order of the words."""
    missing = [word for word in words if not (root / word).is_dir()]
    if missing:
        raise ValueError(f"{str(root)!r} has no folder {shortened(missing)}; name only words that it holds")
    listed = {name: _listed(root / file) for name, file in LISTS.items()}
    both = sorted(listed["validation"] & listed["test"])
    if both:
        raise ValueError(f"{str(root)!r}: both lists name {shortened(both)}; keep it in one")
    files = [f"{word}/{path.name}" for word in words for path in sorted((root / word).glob("*.wav"))]
    for name, held_out in listed.items():
        lost = sorted(file for file in held_out.difference(files) if file.partition("/")[0] in words)
        if lost:
            raise ValueError(f"{root / LISTS[name]} names {shortened(lost)}, which {str(root)!r} does not hold")
    chosen = listed.get(split, set(files).difference(*listed.values()))
    found = [file for file in files if file in chosen]
    if not found:
        raise ValueError(f"{str(root)!r} holds no file of {shortened(words) or 'any word'} for split={split!r}")
    return found


def _listed(path: Path) -> set[str]:
    try:
        return set(path.read_text("utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, which lists files, cannot be read: {one_line(error)}") from error


def synthesise(folder: str, words: Sequence[str] = SC10, samples_per_word: int = 220, seed: int = 0) -> None:
    """Let espeak-ng say words, and write them as Speech Commands: OUT/WORD/VOICE_nohash_NUMBER.wav and both lists.

    The eleven voices take turns. Two of them, a man's and a woman's, are for validation, two for the test, and none
    of these is in another split. For each file are drawn: an accent, the speed, the pitch, where in the second the
    word lies, the noise's colour and strength, and the level. All depends on the seed, the word, the number and
    espeak-ng's version alone.

    Raises:
        ValueError: espeak-ng is missing, or does not speak; the folder is not empty; a word is not of English
            letters alone, or is named twice; the seed is negative.
    """
    root, odd = Path(folder), [word for word in words if not (word.isascii() and word.isalpha())]
    if odd or not words:
        raise ValueError(f"words must be of letters from a to z alone, not {shortened(map(repr, odd)) or 'missing'}")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if shutil.which("espeak-ng") is None:
        raise ValueError("espeak-ng, which says the words, is not installed: apt-get install espeak-ng")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{folder!r} is not empty; name a new folder")
    lists: dict[str, list[str]] = {name: [] for name in LISTS}
    for word in _unique(words):
        (root / word).mkdir(parents=True)
        for number in range(samples_per_word):
            voice = VOICES[number % len(VOICES)]
            file = f"{word}/{voice}_nohash_{number}.wav"
            generator = np.random.default_rng([seed, zlib.crc32(word.encode()), number])
            _write_wav(root / file, _second_of(word, voice, generator))
            for name, voices in HELD_OUT.items():
                lists[name] += [file] * (voice in voices)
    for name, files in lists.items():
        (root / LISTS[name]).write_text("".join(f"{file}\n" for file in files))


def _second_of(word: str, voice: str, generator: np.random.Generator) -> Signal:
    """(16000,): the word somewhere in a second of noise."""
    accent = ACCENTS[generator.integers(len(ACCENTS))]
    speed, pitch = (int(generator.integers(*bounds, endpoint=True)) for bounds in (SPEED, PITCH))
    speech = _spoken(word, f"{accent}+{voice}", speed, pitch)[:RATE]
    slope, snr_db, level = (generator.uniform(*bounds) for bounds in (NOISE_SLOPE, SNR_DB, LEVEL))
    begin = generator.integers(RATE - len(speech), endpoint=True)
    spectrum = np.fft.rfft(generator.standard_normal(RATE))
    spectrum[0] = 0
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-slope / 2)
    second = np.fft.irfft(spectrum, RATE)
    second *= math.sqrt(np.mean(speech**2) / np.mean(second**2) / 10 ** (snr_db / 10))
    second[begin : begin + len(speech)] += speech
    return second * (level / np.abs(second).max())


def _spoken(word: str, voice: str, speed: int, pitch: int) -> Signal:
    """espeak-ng's rendering at 16 kHz without silence at its ends."""
    command = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch), word]
    run = subprocess.run(command, capture_output=True, check=False)
    if run.returncode or not run.stdout:
        reason = " ".join(run.stderr.decode(errors="replace").split())
        raise ValueError(f"{' '.join(command)} ended with exit code {run.returncode}: {reason or 'no sound'}")
    with wave.open(io.BytesIO(run.stdout)) as file:
        signal = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
        signal = _resampled(signal, file.getframerate())
    loud = np.flatnonzero(np.abs(signal) > SILENT * np.abs(signal).max(initial=0))
    if not len(loud):
        raise ValueError(f"{' '.join(command)} is silent; choose another word")
    return signal[loud[0] : loud[-1] + 1]


def _resampled(signal: Signal, rate: int) -> Signal:
    """From ``rate`` to 16 kHz, without what the latter cannot hold; zeros at the end up to whole samples of both."""
    unit = rate // math.gcd(rate, RATE)
    before = -(-len(signal) // unit) * unit
    after = before * RATE // rate
    return np.fft.irfft(np.fft.rfft(signal, before)[: after // 2 + 1], after) * (after / before)


def _write_wav(path: Path, signal: Signal) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(signal * (2**15 - 1)).astype("<i2").tobytes())


def main() -> None:
    args = parse_args()
    try:
        with console.interruptible():
            synthesise(args.out, args.words, args.samples_per_word, args.seed)
    except (OSError, ValueError) as error:
        console.fail(PROGRAM, error)
    console.tell(PROGRAM, f"{args.out}: {args.samples_per_word} files of {len(args.words)} words each\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=console.path, help="a new folder")
    parser.add_argument("--words", nargs="+", default=SC10, help="by default the ten of Speech Commands' SC10")
    parser.add_argument("--samples-per-word", type=console.count, default=220, help="by default 220: 20 of each voice")
    parser.add_argument("--seed", type=int, default=0, help="by default 0")
    return parser.parse_args()


if __name__ == "__main__":
    main()
