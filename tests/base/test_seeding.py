import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.base.seeding import (
    derive_seed,
    numpy_generator,
    permutation,
    python_generator,
)

ARGUMENTS = st.tuples(
    st.integers(-(2**70), 2**70), st.text(), st.lists(st.integers(0, 2**40), max_size=3)
)


def test_a_seed_is_the_first_63_bits_of_the_hash():
    # The same hash by another program: printf '["ppo/rollout", 7, 3, 1]' | sha256sum
    text = '["ppo/rollout", 7, 3, 1]'
    digest = subprocess.run(
        ["sha256sum"], input=text, capture_output=True, text=True, check=True
    ).stdout
    assert derive_seed(7, "ppo/rollout", 3, 1) == int(digest[:16], 16) // 2


def test_a_seed_is_the_same_in_another_process():
    program = "from starling.base.seeding import derive_seed; print(derive_seed(1, 'demo', 2))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        ).stdout
        for hash_seed in (1, 2)
    }
    assert outputs == {f"{derive_seed(1, 'demo', 2)}\n"}


@settings(deadline=None)
@given(one=ARGUMENTS, other=ARGUMENTS)
def test_seeds_differ_wherever_the_arguments_do(one, other):
    first = derive_seed(one[0], one[1], *one[2])
    second = derive_seed(other[0], other[1], *other[2])
    assert (first == second) == (one == other)
    assert 0 <= first < 2**63


def test_counters_are_not_run_together():
    assert (
        len({derive_seed(0, "a", 1, 23), derive_seed(0, "a", 12, 3), derive_seed(0, "a", 123)}) == 3
    )
    assert derive_seed(1, "a", 0) != derive_seed(0, "a", 1)


def test_a_counter_that_is_no_whole_number_is_refused():
    with pytest.raises(TypeError):
        derive_seed(0, "a", 1.0)


def test_generators_start_at_the_derived_seed():
    seed = derive_seed(5, "sft/order", 2)
    drawn = numpy_generator(5, "sft/order", 2).random(4)
    assert drawn.tolist() == np.random.Generator(np.random.PCG64(seed)).random(4).tolist()
    assert python_generator(5, "x").random() == python_generator(5, "x").random()
    assert python_generator(5, "x").random() != python_generator(5, "y").random()


@settings(deadline=None)
@given(n=st.integers(0, 50), seed=st.integers(0, 100), epoch=st.integers(0, 5))
def test_a_permutation_visits_everything_once_and_is_repeatable(n, seed, epoch):
    order = permutation(n, seed, "sft/order", epoch)
    assert sorted(order) == list(range(n))
    assert all(type(index) is int for index in order)
    assert order == permutation(n, seed, "sft/order", epoch)


def test_every_epoch_has_its_own_order_and_all_orders_are_as_likely():
    assert permutation(50, 0, "a", 0) != permutation(50, 0, "a", 1)
    assert permutation(50, 0, "a", 0) != permutation(50, 0, "b", 0)
    counts = Counter(tuple(permutation(3, 0, "a", epoch)) for epoch in range(3000))
    # 3000 draws of 6 orders: 500 each, standard deviation 20.4; five of them is 102.
    assert len(counts) == 6
    assert all(abs(count - 500) < 102 for count in counts.values())
