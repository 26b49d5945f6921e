from benchmarks.gpu_card import describe, matmul_rate


def test_the_rate_is_that_of_products_which_were_computed():
    assert 0 < matmul_rate(side=64, seconds=0.01) < 1e4


def test_the_device_has_a_name():
    assert describe()["device"]
