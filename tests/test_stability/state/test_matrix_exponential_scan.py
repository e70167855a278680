"""The scan with the matrix exponential, against numbers and eigenbases."""

import pytest
import torch
from stability_oracles import (
    assert_printed,
    batch_of,
    coupled_inputs,
    detmat,
    double,
    eigenbasis_scan,
    normal_and_coupled,
    scan,
)

from mmstabvim.stability import decompose, matrix_exponential_scan

DELTA, U = double([0.5, 1, 0.25]), double([1, -2, 3])

COUPLED_OUTPUTS = {
    'euler': [
        0.1287090827,
        0.1925518532,
        -0.0158168305,
        -0.3455081645,
        -0.3000006325,
        0.3847096511,
    ],
    'zoh': [
        0.1225872768,
        0.1866937536,
        -0.0075835815,
        -0.2467186565,
        -0.3856397418,
        0.3262474699,
    ],
}


def test_rotation_block():
    """A real 2 x 2 block is one complex mode."""
    a, w = -0.3, 2.0
    A = double([[a, -w], [w, a]])
    B, C = double([1, 0.5]).expand(3, 2), double([2, -1]).expand(3, 2)
    y, last = scan(A, DELTA, U, B, C)
    assert_printed(y, [0.75, -3.9048409711, -0.3626653857])
    state = torch.zeros((), dtype=torch.complex128)
    drive, weight = torch.complex(B[0, 0], B[0, 1]), complex(2, -1)
    for t in range(3):
        mode = torch.exp(DELTA[t] * complex(a, w))
        state = mode * state + DELTA[t] * U[t] * drive
        wanted = (complex(weight).conjugate() * state).real
        assert_printed(y[t], wanted)
    assert_printed(last, torch.view_as_real(state))


@pytest.mark.parametrize(
    ('b_disc', 'printed', 'digits'),
    [
        ('euler', [1.25, 7.3340456204, -3.5538771853], 1e-9),
        ('zoh', [1.05149948, 3.5259231772, -0.0078914139], 6e-9),
    ],
)
def test_two_real_modes(b_disc, printed, digits):
    A = torch.diag(double([-1, -2]))
    B = double([[1, 0.5], [-1, 2], [0.5, 0.5]])
    C = double([[1, 1], [2, -1], [0.5, 3]])
    y, _ = scan(A, DELTA, U, B, C, D=double([0.5]), b_disc=b_disc)
    torch.testing.assert_close(y, double(printed), rtol=0, atol=digits)


@pytest.mark.parametrize(
    ('b_disc', 'printed'), [('euler', 0.3487191399), ('zoh', 0.3160602794)]
)
def test_constant_input(b_disc, printed):
    ones = torch.ones(5).double()
    A, B = double([[-2]]), ones[:, None]
    y, last = scan(A, 0.1 * ones, ones, B, B, b_disc=b_disc)
    assert_printed(y[-1], printed)
    assert_printed(last[0], printed)


def test_zero_order_hold_of_a_singular_matrix():
    A = double([[0, 1], [0, 0]])
    B = double([[1, 2]])
    _, last = scan(A, double([0.3]), double([1]), B, B, b_disc='zoh')
    assert_printed(last, [0.39, 0.6])


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_coupled_matrix(b_disc):
    """Printed outputs, and the eigenbasis to rounding."""
    A = normal_and_coupled()
    basis = decompose(A)
    values = basis.eigenvalues
    order = values.imag.argsort(descending=True)
    assert_printed(
        values[order][[0, 3]],
        [-0.3948565035 + 1.9952165840j, -0.3948565035 - 1.9952165840j],
    )
    real = values.real[order][1:3].sort().values
    assert_printed(real, [-1.5491629196, -0.3299883721])
    assert_printed(basis.condition, 1.6767636933)
    assert_printed(torch.linalg.matrix_norm(A, 2), 2.2816494459)
    inputs = coupled_inputs()
    y, _ = scan(A, *inputs, b_disc=b_disc)
    assert_printed(y, COUPLED_OUTPUTS[b_disc])
    by_basis = eigenbasis_scan(basis, *inputs, b_disc)
    assert (by_basis - y).abs().max() <= 1e-13


def test_gradient_of_the_coupled_matrix():
    grads = []
    for in_basis in (False, True):
        A = normal_and_coupled().requires_grad_()
        if in_basis:
            y = eigenbasis_scan(decompose(A), *coupled_inputs())
        else:
            y, _ = scan(A, *coupled_inputs())
        loss = y.sin().sum()
        loss.backward()
        assert_printed(loss, 0.0449964079)
        first = [0.2156478527, 0.0409717972, 0.0898259047, 0.2206891737]
        last = [-0.2549713748, -0.0027379420, -0.0501005096, -0.2230100202]
        assert_printed(A.grad[0], first)
        assert_printed(A.grad[-1], last)
        grads.append(A.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-13


def test_every_entry_matters():
    """Off the diagonal too: nothing of A is dropped."""
    inputs, A = coupled_inputs(), normal_and_coupled()
    y, _ = scan(A, *inputs)
    for row in range(4):
        for column in range(4):
            other = A.clone()
            other[row, column] += 0.1
            assert (scan(other, *inputs)[0] - y).abs().max() > 1e-4


def sized(batch=2, length=5, dim=6, groups=3, size=4, wide=True):
    """Inputs of a scan with several groups; B and C per group if wide."""
    per_token = (groups, size) if wide else (size,)

    def values(tag, *shape):
        count = torch.Size(shape).numel()
        return detmat(batch * length, count, tag).reshape(
            batch, length, *shape
        )

    return dict(
        u=values(1, dim),
        delta=values(2, dim).abs(),
        A=batch_of(groups, size) - 0.5 * torch.eye(size),
        B=values(3, *per_token),
        C=values(4, *per_token),
        D=detmat(1, dim, 5)[0],
    )


def channel(inputs, batch, d, groups, wide):
    """The arguments of :func:`scan` for one channel of one sequence."""
    g = d // (inputs['u'].shape[-1] // groups)
    B, C = (inputs[k][batch, :, g] if wide else inputs[k][batch] for k in 'BC')
    u, delta = (inputs[k][batch, :, d] for k in ('u', 'delta'))
    return inputs['A'][g], delta, u, B, C


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('wide', [False, True], ids=['shared', 'per group'])
def test_groups(wide, b_disc):
    """Each channel by itself, in its group's eigenbasis."""
    inputs = sized(wide=wide)
    y, last = matrix_exponential_scan(**inputs, b_disc=b_disc)
    assert y.shape == (2, 5, 6)
    assert last.shape == (2, 6, 4)
    for n in range(2):
        for d in range(6):
            A, *rest = channel(inputs, n, d, 3, wide)
            single, state = scan(A, *rest, b_disc=b_disc)
            skip = inputs['D'][d] * rest[1]
            assert_printed(y[n, :, d], single + skip)
            assert_printed(last[n, d], state)
            by_basis = eigenbasis_scan(decompose(A), *rest, b_disc)
            assert (by_basis - single).abs().max() <= 1e-12


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_reverse_is_the_flipped_scan(b_disc):
    inputs = sized()
    y, last = matrix_exponential_scan(**inputs, b_disc=b_disc, reverse=True)
    flipped = {
        k: v.flip(1) if k in ('u', 'delta', 'B', 'C') else v
        for k, v in inputs.items()
    }
    y2, last2 = matrix_exponential_scan(**flipped, b_disc=b_disc)
    assert torch.equal(y, y2.flip(1))
    assert torch.equal(last, last2)


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_scan_gradients(b_disc):
    """Every input, through output and last state, also if defective."""
    inputs = sized(1, 3, 2, 2, 2)
    inputs['A'][0] = double([[-0.5, 1], [0, -0.5]])
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*tensors):
        return matrix_exponential_scan(*tensors, b_disc=b_disc)

    assert torch.autograd.gradcheck(run, leaves)


def test_scan_precision_and_autocast():
    inputs = sized()
    exact, _ = matrix_exponential_scan(**inputs)
    half = {k: v.bfloat16() for k, v in inputs.items()}
    assert matrix_exponential_scan(**half)[0].dtype == torch.float32
    single = {k: v.float() for k, v in inputs.items()}
    with torch.autocast('cpu', torch.bfloat16):
        y, last = matrix_exponential_scan(**single)
    assert y.dtype == last.dtype == torch.float32
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_scan_of_one_token_without_skip():
    inputs = sized(1, 1, 2, 1, 3)
    del inputs['D']
    y, last = matrix_exponential_scan(**inputs)
    drive = inputs['delta'][0, 0] * inputs['u'][0, 0]  # (dim,)
    wanted = drive[:, None] * inputs['B'][0, 0]
    torch.testing.assert_close(last[0], wanted)
    torch.testing.assert_close(y[0, 0], wanted @ inputs['C'][0, 0, 0])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(b_disc='foh'), "b_disc must be one of .*got 'foh'"),
        (dict(delta=torch.ones(2, 5, 5)), 'u and delta must be'),
        (dict(u=torch.ones(2, 0, 6), delta=torch.ones(2, 0, 6)), 'length > 0'),
        (dict(A=torch.ones(4, 4)), 'A must be'),
        (dict(A=torch.ones(4, 4, 4)), 'groups dividing dim=6'),
        (dict(A=torch.ones(0, 4, 4)), 'A must not be empty'),
        (dict(A=torch.ones(3, 4, 4) * torch.nan), '^A must be finite'),
        (dict(A=torch.ones(3, 4, 4) + 0j), 'A must be real'),
        (dict(B=torch.ones(2, 5, 2, 4)), 'B must be'),
        (dict(C=torch.ones(2, 5, 3)), 'C must be'),
        (dict(D=torch.ones(5)), r'D must be \(6,\), got \(5,\)'),
    ],
)
def test_bad_scan_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        matrix_exponential_scan(**(sized() | changes))
