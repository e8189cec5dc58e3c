"""Speed, memory and time left."""

import pytest

from megatron_moe.metrics.throughput import Throughput, format_duration, peak_memory_bytes, tflops_per_device


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_window_covers_what_happened_since_the_last_log_line():
    clock = Clock()
    throughput = Throughput(clock)
    for _ in range(4):
        clock.now += 0.5
        throughput.add(tokens=100)
    window = throughput.restart()
    assert (window.iteration_time_ms, window.tokens_per_second) == (500.0, 200.0)
    clock.now += 1.0
    throughput.add(tokens=50)
    assert throughput.restart().tokens_per_second == 50.0


def test_evaluation_and_saving_do_not_count_as_training_time():
    clock = Clock()
    throughput = Throughput(clock)
    clock.now += 1.0
    throughput.add(tokens=100)
    with throughput.excluded():
        clock.now += 60.0
    assert throughput.restart().iteration_time_ms == 1000.0


def test_a_window_without_steps_or_time_is_not_an_error():
    window = Throughput(Clock()).restart()
    assert (window.iteration_time_ms, window.tokens_per_second) == (0.0, 0.0)


def test_tflops_are_per_device():
    assert tflops_per_device(6e9, 1000.0, 2) == 3.0


def test_peak_memory_on_a_cpu_is_that_of_the_process_in_bytes():
    before = peak_memory_bytes("cpu")
    block = bytearray(b"x") * (64 << 20)
    assert 10 << 20 < before < 1 << 40
    assert peak_memory_bytes("cpu") >= before + (32 << 20) or before > len(block)  # an earlier peak may have been higher


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"), (3725, "1:02:05"), (59.6, "0:01:00"), (90000, "1 day, 1:00:00"), (200000, "2 days, 7:33:20"),
        (float("nan"), "unknown"), (float("inf"), "unknown"),
    ],
)  # fmt: skip
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text
