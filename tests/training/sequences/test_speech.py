"""Spoken words: values, rates, Speech Commands' splits, hostile files, and what espeak-ng makes."""

import shutil
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused

from sgconvnext.training.sequences import speech
from sgconvnext.training.sequences.speech import RATE, Speech, synthesise

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs Debian's espeak-ng")


def write_wav(path: Path, samples: list[int], rate: int = RATE, bits: int = 16, channels: int = 1) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, bits // 8, rate, 0, "NONE", ""))
        file.writeframes(np.array(samples, "u1" if bits == 8 else "<i2").tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two words of three files each, the second of them for validation and the third for the test, and no words."""
    for number, word in enumerate(("no", "yes")):
        for i in range(3):
            write_wav(tmp_path / word / f"{i}_nohash_0.wav", [1000 * number + i] * RATE)
    write_wav(tmp_path / "_background_noise_" / "noise.wav", [1] * RATE)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").write_text("Speech Commands")
    (tmp_path / "validation_list.txt").write_text("no/1_nohash_0.wav\nyes/1_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/2_nohash_0.wav\nyes/2_nohash_0.wav\n")
    return tmp_path


def first(root: Path, content: list[int] | bytes, **form: int) -> Path:
    """The file of the first item of training, with other content."""
    path = root / "no" / "0_nohash_0.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_wav(path, content, **form)
    return path


def test_values_are_the_integers_over_2_to_the_15(root: Path) -> None:
    first(root, [0, 1, -1, 32767, -32768] + [0] * (RATE - 5))
    waveform, target = Speech(str(root), "train")[0]
    assert (waveform.shape, waveform.dtype, target) == ((1, RATE), torch.float32, 0)
    assert (waveform[0, :5] * 2**15).tolist() == [0, 1, -1, 32767, -32768]


def test_short_files_are_padded_and_long_ones_cut(root: Path) -> None:
    first(root, [7] * 100)
    waveform, _ = Speech(str(root), "train")[0]
    assert (waveform * 2**15).tolist() == [[7] * 100 + [0] * (RATE - 100)]
    first(root, [7] * RATE + [8] * 100)
    assert (Speech(str(root), "train")[0][0] * 2**15).tolist() == [[7] * RATE]
    assert Speech(str(root), "train", length=4096)[0][0].shape == (1, 4096)


@pytest.mark.parametrize("rate", [8000, 4000, 3200])
def test_lower_rates_take_every_kth_sample_as_it_is(root: Path, rate: int) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, RATE).tolist()
    first(root, samples)
    waveform, _ = Speech(str(root), "train", rate=rate)[0]
    assert (waveform[0] * 2**15).tolist() == samples[:: RATE // rate]


@pytest.mark.parametrize("rate", [0, -8000, 11025, 32000])
def test_other_rates_are_refused(root: Path, rate: int) -> None:
    with refused(f"rate={rate}", "8000"):
        Speech(str(root), "train", rate=rate)


def test_splits_are_those_of_the_lists(root: Path) -> None:
    files = {split: Speech(str(root), split).files for split in ("train", "validation", "test")}
    assert files == {
        split: [f"no/{i}_nohash_0.wav", f"yes/{i}_nohash_0.wav"]
        for i, split in enumerate(("train", "validation", "test"))
    }


def test_classes_are_the_words_in_the_order_asked_for(root: Path) -> None:
    assert Speech(str(root), "train").class_to_idx == {"no": 0, "yes": 1}  # no _background_noise_
    dataset = Speech(str(root), "train", words=["yes", "no"])
    assert [(round(float(x[0, 0]) * 2**15), target) for x, target in (dataset[0], dataset[1])] == [(1000, 0), (0, 1)]
    assert len(Speech(str(root), "train", words=["yes"])) == 1


def test_missing_parts_of_the_folder_are_refused(root: Path) -> None:
    with refused("nowhere", "is no folder"):
        Speech("nowhere", "train")
    with refused("'val'", "train, validation, test"):
        Speech(str(root), "val")
    with refused(str(root), "no folder maybe"):
        Speech(str(root), "train", words=["yes", "maybe"])
    with refused("yes twice"):
        Speech(str(root), "train", words=["yes", "no", "yes"])
    (root / "yes" / "1_nohash_0.wav").unlink()
    with refused("validation_list.txt", "yes/1_nohash_0.wav"):
        Speech(str(root), "train")
    with refused("holds no file of no for split='validation'"):
        (root / "validation_list.txt").write_text("")
        Speech(str(root), "validation", words=["no"])
    (root / "testing_list.txt").unlink()
    with refused("testing_list.txt"):
        Speech(str(root), "train")


def test_a_file_in_both_lists_is_refused(root: Path) -> None:
    (root / "testing_list.txt").write_text("no/1_nohash_0.wav\n")
    with refused(str(root), "no/1_nohash_0.wav", "both lists"):
        Speech(str(root), "train")


@pytest.mark.parametrize("content", [b"", b"RIFF", b"no wav file " * 99, b"RIFF\xff\xff\xff\xffWAVEfmt "])
def test_what_is_no_wav_file_is_refused_by_its_name(root: Path, content: bytes) -> None:
    path = first(root, content)
    with refused(str(path), "no wav file"):
        Speech(str(root), "train")[0]


@pytest.mark.parametrize("form", [{"rate": 44100}, {"channels": 2}, {"bits": 8}])
def test_other_forms_of_wav_files_are_refused_with_what_converts_them(root: Path, form: dict[str, int]) -> None:
    path = first(root, [1] * 100, **form)
    with refused(str(path), str(next(iter(form.values()))), "sox"):
        Speech(str(root), "train")[0]


def test_every_cut_of_a_file_is_refused(root: Path) -> None:
    path = first(root, [1] * 20)
    whole = path.read_bytes()
    dataset = Speech(str(root), "train")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with refused(str(path)):
            dataset[0]


def test_a_file_without_samples_is_refused(root: Path) -> None:
    path = first(root, [])
    with refused(str(path), "holds 0 bytes"):
        Speech(str(root), "train")[0]


def test_a_missing_file_is_refused_by_its_name(root: Path) -> None:
    dataset = Speech(str(root), "train")
    (root / "no" / "0_nohash_0.wav").unlink()
    with refused("no/0_nohash_0.wav"):
        dataset[0]


def test_resampling_keeps_a_tone_and_drops_what_16_khz_cannot_hold() -> None:
    seconds = np.arange(22050) / 22050
    tone = np.sin(2 * np.pi * 7999 * seconds)
    got = speech._resampled(tone + np.sin(2 * np.pi * 8001 * seconds), 22050)
    np.testing.assert_allclose(got, np.sin(2 * np.pi * 7999 * np.arange(RATE) / RATE), atol=1e-9)


def second_of(monkeypatch: pytest.MonkeyPatch, slope: float, snr_db: float) -> np.ndarray:
    """A second with 4000 samples of +1, -1, +1, ... for the word, in noise of one kind."""
    monkeypatch.setattr(speech, "_spoken", lambda *_: np.resize([1.0, -1.0], 4000))
    for name, value in {"NOISE_SLOPE": slope, "SNR_DB": snr_db, "LEVEL": 0.5}.items():
        monkeypatch.setattr(speech, name, (value, value))
    return speech._second_of("go", "m1", np.random.default_rng(0))


def test_the_word_is_whole_and_as_strong_against_the_noise_as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    second = second_of(monkeypatch, slope=0, snr_db=20)
    assert np.abs(second).max() == pytest.approx(0.5)
    word = np.abs(second) > 0.2  # a tenth of its amplitude is the noise's deviation
    assert word.sum() == 4000
    assert np.ptp(np.flatnonzero(word)) == 3999
    assert 95 < np.mean(second[word] ** 2) / np.mean(second[~word] ** 2) < 107


@pytest.mark.parametrize("slope", [0, 1, 2])
def test_noise_falls_with_its_slope(monkeypatch: pytest.MonkeyPatch, slope: int) -> None:
    power = np.abs(np.fft.rfft(second_of(monkeypatch, slope=slope, snr_db=-80))) ** 2
    assert 0.7 < power[100:1000].sum() / power[1000:8000].sum() / [900 / 7000, 1.107, 10.28][slope] < 1.4


def test_without_espeak_synthesis_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with refused("espeak-ng", "apt-get install espeak-ng"):
        synthesise(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--voices"], ["a b"], ["../up"]])
def test_words_that_are_none_are_refused(tmp_path: Path, words: list[str]) -> None:
    with refused("letters from a to z", *map(repr, words)):
        synthesise(str(tmp_path), words)


@needs_espeak
def test_synthesis_needs_an_empty_folder_and_a_seed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with refused(str(tmp_path), "not empty"):
        synthesise(str(tmp_path))
    with refused("seed=-1"):
        synthesise(str(tmp_path / "out"), seed=-1)


@needs_espeak
def test_synthesis_writes_speech_commands_with_each_voice_in_one_split(tmp_path: Path) -> None:
    synthesise(str(tmp_path), ["stop", "go"], samples_per_word=22)
    splits = [Speech(str(tmp_path), split, words=["stop", "go"]) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [28, 8, 8]
    voices = [{file.split("/")[1].split("_nohash_")[0] for file in split.files} for split in splits]
    assert sorted(voice for each in voices for voice in each) == sorted(speech.VOICES)
    for waveform, _ in splits[0]:
        assert waveform.shape == (1, RATE)
        assert 0.099 < waveform.abs().max() < 0.901
    assert len({path.read_bytes() for path in tmp_path.rglob("*.wav")}) == 44
    for path in (tmp_path / "go").iterdir():
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (1, 2, RATE, RATE)


@needs_espeak
def test_a_word_begins_and_ends_with_sound() -> None:
    word = np.abs(speech._spoken("stop", "en+f2", 175, 50))
    assert min(word[0], word[-1]) > 0.01 * word.max()
    assert 3000 < len(word) < RATE


@needs_espeak
def test_the_seed_decides_every_file(tmp_path: Path) -> None:
    for name, words, seed in (("a", ["up"], 3), ("b", ["go", "up"], 3), ("c", ["up"], 4)):
        synthesise(str(tmp_path / name), words, samples_per_word=2, seed=seed)
    a, b, c = (
        [(tmp_path / name / "up" / f"m{i + 1}_nohash_{i}.wav").read_bytes() for i in range(2)] for name in "abc"
    )
    assert a == b
    assert a[0] != a[1]
    assert not set(a) & set(c)


@needs_espeak
def test_the_command_writes_a_set_and_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["speech", out, "--words", "yes", "no", "--samples-per-word", "1"])
    speech.main()
    assert capsys.readouterr().out == f"{out}: 1 files of 2 words each\n"
    assert len(Speech(out, "train")) == 2
    with pytest.raises(SystemExit) as caught:
        speech.main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "not empty" in told
