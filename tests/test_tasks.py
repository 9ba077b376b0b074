"""Tasks: whatever a batch, an output and labels look like, sums and numbers are right, and mistakes are told by what
was found."""
import collections
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from lap_nb.depth import depth_curve, recompute_statistics, shorten
from lap_nb.nets import dense_net
from lap_nb.tasks import inputs_of, Task
from lap_nb.training import evaluate

ids = lambda *rows: torch.tensor(rows)


@dataclasses.dataclass
class Data: x: torch.Tensor; labels: torch.Tensor


Named = collections.namedtuple('Named', 'x target')


class Output(collections.OrderedDict):
    "As a library's: fields by name and by attribute."
    __getattr__ = collections.OrderedDict.__getitem__


class Net(nn.Module):
    def __init__(self, out=lambda z: z, classes=3):
        super().__init__()
        self.layer, self.out = nn.Linear(2, classes), out
    def forward(self, x): return self.out(self.layer(x))


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


WAYS = dict(pair=lambda x, y: (x, y), list=lambda x, y: [x, y], mapping=lambda x, y: dict(x=x, labels=y),
            user=lambda x, y: collections.UserDict(x=x, label=y), data=Data, named=Named,
            strange_name=lambda x, y: dict(pixel_values=x, y=y))
FORMS = dict(tensor=lambda z: z, tuple=lambda z: (z, None), mapping=lambda z: dict(logits=z), out=lambda z: dict(out=z),
             attribute=lambda z: Output(loss=None, logits=z), half=lambda z: z.bfloat16())


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('form', FORMS)
def test_each_batch_and_output_is_understood(way, form):
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0])
    net, task, batch = Net(FORMS[form]), Task.classification(), WAYS[way](x, y)
    total, count = task.loss(net, batch)
    wanted = F.cross_entropy(net.layer(x), y, reduction='sum')
    torch.testing.assert_close(total, wanted, **({'rtol': .02, 'atol': .02} if form == 'half' else {}))
    assert count == 5 and task.score(net, batch)[1] == 5
    total.backward()
    assert net.layer.weight.grad.abs().sum() > 0
    assert Task.guess(task.run(net, batch), batch).name == 'accuracy'
    found = inputs_of(batch)
    assert (next(iter(found.values())) if isinstance(found, dict) else found) is x


@pytest.mark.parametrize('labels', [[0, 1, 2], np.array([0, 1, 2]), torch.tensor([0, 1, 2], dtype=torch.uint8),
                                    torch.tensor([0, 1, 2], dtype=torch.int32)])
def test_whole_numbers_of_any_kind_are_labels(labels):
    x = torch.randn(3, 2)
    assert Task.classification().loss(Net(), (x, labels))[1] == 3


MISTAKES = {
    'from one': (torch.tensor([1, 2, 3, 3]), ValueError, 'subtract 1'),
    'too large': (torch.tensor([0, 1, 7, 0]), ValueError, 'labels run from 0 to 7, expected 0 to 2'),
    'negative': (torch.tensor([0, -1, 1, 0]), ValueError, 'labels run from -1'),
    'one-hot': (F.one_hot(torch.tensor([0, 1, 2, 1]), 3), ValueError, r'take labels.argmax\(-1\)'),
    'one-hot floats': (F.one_hot(torch.tensor([0, 1, 2, 1]), 3).float(), ValueError, r'take labels.argmax\(-1\)'),
    'floats': (torch.tensor([0., 1., 2., 1.]), TypeError, r'labels.long\(\)'),
    'column': (torch.tensor([[0], [1], [2], [1]]), ValueError, 'reshape them'),
    'too few': (torch.tensor([0, 1]), ValueError, r'expected whole numbers from 0 to 2 of shape \[4\]'),
    'strings': (['a', 'b', 'c', 'a'], TypeError, 'give names numbers first'),
    'complex': (torch.zeros(4, dtype=torch.complex64), TypeError, 'expected whole numbers'),
    'sparse': (torch.zeros(4).to_sparse(), TypeError, 'expected whole numbers'),
    'nothing': (None, ValueError, 'the batch has no labels'),
    'ragged': ([[0], [1, 2], [0], [1]], TypeError, 'expected whole numbers'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_labels_are_told_by_what_was_found(mistake):
    labels, kind, words = MISTAKES[mistake]
    x = torch.randn(4, 2)
    for task in (Task.classification(), Task.classification(.1)):
        for call in (task.loss, task.score, task.mean_loss):
            with pytest.raises(kind, match=words): call(Net(), dict(x=x, labels=labels) if labels is not None else x)


@pytest.mark.parametrize('batch, words', [
    ('text', 'expected a tensor, a tuple'), ((), 'expected a tensor, a tuple'), (None, 'expected a tensor, a tuple'),
    (3, 'expected a tensor'),
    ({}, 'has no field alone'), (dict(labels=torch.zeros(2)), 'expected inputs beside'),
    ({1: torch.zeros(2)}, 'expected names: strings'),
    (dict(x=torch.zeros(2, 2), y=torch.zeros(2), label=torch.zeros(2)), 'one field of labels'),
    (dict(a=torch.zeros(2, 2), b=torch.zeros(2, 2), y=torch.zeros(2)), 'the batch has a, b, and Net takes x'),
])
def test_what_is_no_batch_is_refused(batch, words):
    with pytest.raises((TypeError, ValueError), match=words): Task.classification().loss(Net(), batch)


@pytest.mark.parametrize('out, words', [
    (lambda z: None, 'expected a tensor of floats'), (lambda z: dict(hidden=z), 'which has hidden'),
    (lambda z: z.long(), 'expected a tensor of floats'),
    (lambda z: z.sum(), 'expected a tensor of floats'), (lambda z: z[:, :1], 'one number per label'),
    (lambda z: z[..., None], 'expected logits'),
    (lambda z: (), 'expected a tensor of floats'),
])
def test_what_is_no_answer_is_refused(out, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Task.classification().loss(Net(out), (torch.randn(4, 2), torch.tensor([0, 0, 0, 0])))


class Words(nn.Module):
    "Each token is predicted from the mean of the real ones so far."
    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
    def get_input_embeddings(self): return self.table
    def forward(self, input_ids, attention_mask=None, use_cache=True):
        assert not use_cache   # a score needs none
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sums = (self.table(input_ids) * real[..., None]).cumsum(1)
        return Output(logits=self.head(sums / real.cumsum(1).clamp_min(1)[..., None]))


SENTENCES = st.lists(st.lists(st.integers(1, 10), min_size=1, max_size=7), min_size=1, max_size=5)


@given(SENTENCES, st.booleans(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_padding_and_uneven_batches_change_nothing(sentences, left, size):
    """However sentences are cut into batches, and on whichever side they are padded, sums and numbers are those of each
    alone."""
    torch.manual_seed(0)
    words, task = Words().double(), Task.language_model()
    alone = [task.loss(words, dict(input_ids=torch.tensor([s]))) for s in sentences]
    wanted, number = sum(a for a, _ in alone), sum(n for _, n in alone)
    total, count = 0., 0
    for start in range(0, len(sentences), size):
        rows = sentences[start:start + size]
        longest = max(map(len, rows))
        pad = lambda s, fill: [0] * (longest - len(s)) + fill if left else fill + [0] * (longest - len(s))
        batch = dict(
            input_ids=torch.tensor([pad(s, s) for s in rows]),
            attention_mask=torch.tensor([pad(s, [1] * len(s)) for s in rows]),
        )
        for given_labels in (False, True):
            if given_labels: batch['labels'] = batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -100)
            found = task.loss(words, batch)
        total, count = total + found[0], count + found[1]
    assert count == number == sum(len(s) - 1 for s in sentences)
    torch.testing.assert_close(
        torch.as_tensor(total, dtype=torch.float64),
        torch.as_tensor(wanted, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-10,
    )


def test_language_models_agree_with_the_usual_loss():
    words, task, tokens = Words(), Task.language_model(), torch.randint(1, 11, (3, 6))
    labels = tokens.clone()
    labels[0, 2:4] = -100
    z = words(tokens, use_cache=False)['logits']
    for batch, y in (
        (dict(input_ids=tokens), tokens),
        (dict(input_ids=tokens, labels=labels), labels),
        ((tokens, labels), labels),
    ):
        wanted = F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        output = z if isinstance(batch, tuple) else None
        torch.testing.assert_close(task.mean_loss(words, batch, output), wanted)
    moved = Task.language_model(shift=False)
    torch.testing.assert_close(
        moved.mean_loss(words, (tokens[:, :-1], tokens[:, 1:]), z[:, :-1]),
        F.cross_entropy(z[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
    )
    assert task.told(math.log(7.)) == pytest.approx(7.) and task.told(1e6) == math.inf


def test_mistakes_of_language_models():
    words, task = Words(), Task.language_model()
    with pytest.raises(ValueError, match='tokens run from 1 to 11, expected 0 to 10'):
        task.run(words, dict(input_ids=ids([1, 11])))
    with pytest.raises(ValueError, match='nothing in the batch counts'): task.mean_loss(words, dict(input_ids=ids([1])))
    with pytest.raises(ValueError, match='nothing in the batch counts'):
        task.mean_loss(words, dict(input_ids=ids([1, 2]), labels=ids([-100, -100])))
    with pytest.raises(ValueError, match='expected logits'):
        task.loss(None, dict(input_ids=ids([1, 2])), torch.zeros(1, 11))
    row = ids([1, 2, 3, 4])
    z = words(row, use_cache=False)['logits']
    with pytest.raises(ValueError, match='shift=False'):
        task.check(z[:, :-1], dict(input_ids=row[:, :-1], labels=row[:, 1:]))
    with pytest.raises(ValueError, match='shift=True'):
        Task.language_model(shift=False).check(z, dict(input_ids=row, labels=row))
    with pytest.raises(ValueError, match='nothing is masked'):
        Task.masked_language_model().check(z, dict(input_ids=row, labels=row))
    task.check(z, dict(input_ids=row, labels=row))


def test_masked_language_models_count_masks_alone():
    words, tokens = Words(), ids([1, 2, 3, 4], [5, 6, 0, 0])
    labels, mask = ids([-100, 9, -100, 4], [5, -100, -100, 3]), ids([1, 1, 1, 1], [1, 1, 0, 0])
    batch, task = dict(input_ids=tokens, attention_mask=mask, labels=labels), Task.masked_language_model()
    z = words(tokens, mask, use_cache=False)['logits']
    at = (labels != -100) & (mask == 1)
    torch.testing.assert_close(task.mean_loss(words, batch), F.cross_entropy(z[at], labels[at]))
    assert task.loss(words, batch)[1] == 3 and task.score(words, batch)[0] == (z.argmax(-1) == labels)[at].sum()
    assert Task.guess(dict(logits=z), batch).name == 'accuracy of masked tokens'


@pytest.mark.parametrize('shape', [(5, 4), (3, 4, 5), (2, 2, 3, 4)])
def test_segments_in_any_number_of_dimensions(shape):
    z, y = torch.randn(2, 3, *shape), torch.randint(3, (2, *shape))
    y.view(-1)[::3] = 255
    total, count = Task.segmentation(ignore_index=255).loss(None, dict(x=z, labels=y), dict(out=z))
    torch.testing.assert_close(total / count, F.cross_entropy(z, y, ignore_index=255))
    assert count == (y != 255).sum()


def test_mistakes_of_segmentation_and_regression():
    z, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    seg, reg = Task.segmentation(), Task.regression()
    with pytest.raises(ValueError, match=r'squeeze\(1\)'): seg.loss(None, (z, y[:, None]), z)
    with pytest.raises(ValueError, match='interpolate the logits'): seg.loss(None, (z, y), z[..., ::2, ::2])
    with pytest.raises(ValueError, match='pass ignore_index='): seg.loss(None, (z, y.masked_fill(y == 1, 255)), z)
    with pytest.raises(ValueError, match='expected logits'): seg.loss(None, (z, y), z[:, 0, 0])
    with pytest.raises(ValueError, match='expected one shape'):
        reg.loss(None, (z, torch.randn(4, 2)), torch.randn(4, 3))
    with pytest.raises(ValueError, match='expected one shape'): reg.loss(None, (z, torch.randn(4)), torch.randn(4, 3))
    with pytest.raises(TypeError, match='for classes'):
        reg.loss(None, (z, torch.ones(4, dtype=torch.bool)), torch.randn(4))
    with pytest.raises(ValueError, match='1 of 4 labels are not finite'):
        reg.check(torch.randn(4), (z, torch.tensor([0., math.nan, 1., 2.])))


@pytest.mark.parametrize('found, wanted', [
    ((4,), (4,)), ((4, 1), (4,)), ((4, 1), (4, 1)), ((4, 3), (4, 3)), ((4, 2, 3), (4, 2, 3))])
def test_regression_weighs_samples_alike(found, wanted):
    z, y = torch.randn(found), torch.randn(wanted)
    total, count = Task.regression().loss(None, (y, y), z)
    torch.testing.assert_close(total / count, F.mse_loss(z.view(wanted), y))
    assert count == 4 and Task.regression().told(4.) == 2.


def test_a_teacher_is_left_as_it_is():
    teacher, pupil, x = dense_net(2, 3, K=2), Net(), torch.randn(6, 2)
    teacher.encoder.eval()   # by hand
    modes, state = [m.training for m in teacher.modules()], torch.get_rng_state()
    task = Task.distillation(teacher, temperature=2.)
    task.loss(pupil, x)[0].backward()
    assert modes == [m.training for m in teacher.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in teacher.parameters())
    z, aim = pupil(x) / 2, teacher.eval()(x) / 2
    wanted = 4 * F.kl_div(z.log_softmax(1), aim.softmax(1), reduction='sum')
    torch.testing.assert_close(task.loss(pupil, (x, torch.zeros(6)))[0], wanted)
    with pytest.raises(ValueError, match='expected one shape'): task.loss(Net(classes=4), x)
    with pytest.raises(ValueError, match='temperature'): Task.distillation(teacher, 0.)


def test_own_loss_is_weighed_by_the_labels_that_count():
    class Own(nn.Module):
        def forward(self, x, labels): return Output(loss=F.cross_entropy(x, labels, ignore_index=-100))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, -100, 2, 0])
    total, count = Task.own_loss().loss(Own(), dict(x=x, labels=y))
    torch.testing.assert_close(total, F.cross_entropy(x, y, reduction='sum'))
    with pytest.raises(TypeError, match='fields by name'): Task.own_loss().loss(Own(), (x, y))
    with pytest.raises(TypeError, match='did the batch have labels'):
        Task.own_loss().loss(None, dict(x=x, labels=y), Output(loss=None, logits=x))


def test_what_is_ambiguous_is_not_guessed():
    x = torch.randn(4, 2)
    for output, labels in (
        (torch.randn(4, 3), None),
        (torch.randn(4, 1), torch.tensor([0, 1, 0, 1])),
        (torch.randn(4, 3), torch.randn(4)),
        (torch.randn(4, 3, 5), torch.tensor([0, 1, 0, 1])),
    ):
        with pytest.raises(ValueError, match='pass task='):
            Task.guess(output, x if labels is None else (x, labels))


@pytest.mark.parametrize('loss, words', [
    (lambda o, b: o.sum(), 'expected a pair'), (lambda o, b: (o, 3), 'expected a sum and a count'),
    (lambda o, b: (o.sum().long(), 3), 'expected a sum and a count')])
def test_a_loss_of_ones_own_is_looked_at(loss, words):
    with pytest.raises(TypeError, match=words): Task(loss).loss(Net(), torch.randn(4, 2))


def test_a_task_of_ones_own_and_better_directions():
    task = Task(
        lambda o, b: (o.square().sum(), len(o)),
        lambda o, b: (o.sum(), len(o)),
        'size',
        True,
        told=lambda m: 100 * m,
        run=lambda model, batch: model(batch[0]),
    )
    assert task.score(Net(), (torch.zeros(2, 2), 0))[1] == 2 and 'size, higher' in repr(task)
    with pytest.raises(TypeError): Task(3)
    with pytest.raises(TypeError): task.run('no model', torch.zeros(2, 2))


def test_tasks_can_be_sent_to_other_processes():
    for task in (
        Task.classification(0.1),
        Task.language_model(),
        Task.masked_language_model(),
        Task.regression(),
        Task.segmentation(255),
        Task.own_loss(),
        Task.distillation(Net(nn.Identity())),
    ):
        assert pickle.loads(pickle.dumps(task)).name == task.name


def test_errors_in_the_model_say_what_it_was_given():
    with pytest.raises(RuntimeError) as found: Task.classification().run(Net(), (torch.zeros(4, 7), torch.zeros(4)))
    assert any('a tensor [4, 7] of float32' in note for note in found.value.__notes__)


def test_batches_and_outputs_of_transformers():
    hf = pytest.importorskip('transformers')
    config = hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, bos_token_id=0, eos_token_id=0)
    model = hf.GPT2LMHeadModel(config).eval()
    batch = hf.BatchEncoding(
        dict(input_ids=torch.randint(1, 31, (3, 7)), attention_mask=torch.ones(3, 7, dtype=torch.long))
    )
    batch['labels'] = batch['input_ids'].clone()
    torch.testing.assert_close(Task.language_model().mean_loss(model, batch), model(**batch).loss)
    torch.testing.assert_close(Task.own_loss(shift=True).mean_loss(model, batch), model(**batch).loss)
    assert Task.guess(Task.language_model().run(model, batch), batch).name == 'perplexity'

# What uses tasks: evaluation and the tools of depth, with any data.

class Layer(nn.Module):
    def __init__(self, width, f=nn.Tanh, norm=nn.Identity):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), norm(), f(), nn.Linear(width, width))
    def forward(self, x): return x + .3 * self.f(x)


class Chat(nn.Module):
    "A small language model with residual layers and a mask."
    def __init__(self, vocabulary=11, width=8, K=4):
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.layers = nn.ModuleList(Layer(width) for _ in range(K))
    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        for layer in self.layers: x = layer(x)
        return Output(logits=self.head(x))


class Fields(nn.Module):
    "Pictures to a class for each pixel, with batch norm."
    def __init__(self, K=3, width=4):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2, 1)
        self.layers = nn.ModuleList(self.Layer(width) for _ in range(K))
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.f = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)
            )

        def forward(self, x): return x + self.f(x)
    def forward(self, image):
        x = self.first(image)
        for layer in self.layers: x = layer(x)
        return dict(out=self.last(x))


def sentences(rows=6, longest=7):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, longest + 1, (rows,), generator=g)
    ids = torch.randint(1, 11, (rows, longest), generator=g)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return dict(input_ids=ids * mask, attention_mask=mask, labels=(ids * mask).masked_fill(mask == 0, -100))


def cases():
    torch.manual_seed(0)
    chat = [sentences(6), sentences(3, 5)]
    numbers = [(torch.randn(5, 3), torch.randn(5)), (torch.randn(2, 3), torch.randn(2))]
    line = nn.Sequential(nn.Linear(3, 6), *(Layer(6) for _ in range(4)), nn.Linear(6, 1))
    marks = [dict(image=torch.randn(4, 1, 6, 6), labels=torch.randint(2, (4, 6, 6))) for _ in range(2)]
    return dict(language=(Chat(), chat, 'perplexity'), regression=(line, numbers, 'root mean square error'),
                segmentation=(Fields(), marks, 'accuracy of pixels'))


def as_loader(batches): return torch.utils.data.DataLoader(batches, batch_size=None)


def as_file(batches):
    class Once:
        def __iter__(self): return iter(batches)
    return Once()


@pytest.mark.parametrize('name', ['language', 'regression', 'segmentation'])
@pytest.mark.parametrize('way', [list, as_loader, as_file, lambda b: dict(train=b, val=b, test=b)])
def test_evaluation_is_exact_for_uneven_batches(name, way, capsys):
    net, batches, score = cases()[name]
    net.train()
    found, task = (
        evaluate(net, way(batches)),
        Task.guess(net.eval()(**inputs_of(batches[0])) if name != 'regression' else net(batches[0][0]), batches[0]),
    )
    assert f'task: scored by {score}' in capsys.readouterr().out and task.name == score
    pairs = [task.score(net, b) for b in batches]
    wanted = task.told((sum(s for s, _ in pairs) / sum(n for _, n in pairs)).item())
    assert found.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize('name', ['language', 'regression', 'segmentation'])
def test_the_lines_of_the_read_me_work_on_any_data(name):
    net, batches, score = cases()[name]
    data, before = (
        dict(train=batches, val=batches, test=batches[:1]),
        {k: v.clone() for k, v in net.state_dict().items()},
    )
    curve = depth_curve(net, data)
    assert curve.score == score and curve.of('skip')[-1][score] == pytest.approx(
        evaluate(net, batches[:1]).item(), rel=1e-6
    )
    assert score in repr(curve) or curve.percent
    small = shorten(net, data, n_blocks=2, verbose=False)
    assert small.shortened['blocks'] == [len(curve.energies), 2] and small.shortened['score'] == score
    assert evaluate(small, data, 'val').item() == pytest.approx(small.shortened['val_score'][1])
    loose = shorten(net, data, loss_rise=100., verbose=False)
    assert loose.shortened['blocks'][1] == 1
    strict = shorten(net, data, score_drop=1e3 if score != 'accuracy of pixels' else 1., verbose=False)
    assert strict.shortened['blocks'][1] == 1
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)


def test_every_goal_is_kept_on_validation():
    net, batches, score = cases()['language']
    rows = depth_curve(net, batches, 'val', ['skip']).of('skip')
    for row in rows[:-1]:
        allowed = row[score] - rows[-1][score]
        if allowed <= 0: continue
        m = shorten(net, batches, score_drop=allowed, way='skip', verbose=False).shortened['blocks'][1]
        assert m == min(r['blocks'] for r in rows if r[score] <= rows[-1][score] + allowed + 1e-9)
    with pytest.raises(ValueError, match='expected score_drop'): shorten(net, batches, accuracy_drop=.1)
    with pytest.raises(ValueError, match='fit takes a Split'): shorten(net, batches, n_blocks=2, epochs=1)
    with pytest.raises(ValueError, match='score of each sample'): shorten(net, batches, accuracy_drop=.1, confidence=.9)
    with pytest.raises(ValueError, match='exactly one of'): shorten(net, batches, score_drop=1., loss_rise=1.)


def test_a_task_gives_what_a_split_gives():
    from lap_nb.data import digits
    split = digits().split(60)
    net = dense_net(64, 10, K=3).eval()
    pairs = {
        part: [(split.x[at], split.y[at]) for at in getattr(split, part).split(17)] for part in ('train', 'val', 'test')
    }
    assert evaluate(net, split).item() == pytest.approx(
        evaluate(net, pairs, task=Task.classification()).item(), abs=1e-7
    )
    one, other = depth_curve(net, split), depth_curve(net, pairs, task=Task.classification())
    for a, b in zip(one.rows, other.rows):
        assert a['schedule'] == b['schedule'] and a['accuracy'] == pytest.approx(b['accuracy'])
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-5) and a['energy'] == pytest.approx(b['energy'], rel=1e-5)


def test_without_labels_a_network_is_compared_with_itself_in_full():
    net, x = dense_net(2, 3, K=4).eval(), [torch.randn(20, 2) for _ in range(3)]
    curve = depth_curve(net, x, task=Task.distillation(net), ways=['skip'])
    assert (
        curve.score == 'agreement'
        and curve.of('skip')[-1]['agreement'] == 1.0
        and curve.of('skip')[-1]['loss'] == pytest.approx(0, abs=1e-6)
    )
    assert shorten(net, x, score_drop=1., task=Task.distillation(net), verbose=False).shortened['blocks'][1] == 1


@pytest.mark.parametrize('data, words', [
    (iter([]), r'not iter\(\) of it'), ([], 'no batches in'), ({}, 'nothing in it'),
    (dict(validation=[1]), 'mapping with validation'),
    (dict(val=[(torch.zeros(2, 2), torch.zeros(2))]), "no part 'test'"),
    (torch.zeros(3, 2), 'expected a Split'), ('text', 'expected a Split'),
    (None, 'expected a Split'), (dict(test=3), 'expected a Split'), (dict(test=iter([])), r'not iter\(\)')])
def test_what_is_no_data_is_refused(data, words):
    for call in (evaluate, depth_curve):
        with pytest.raises((TypeError, ValueError), match=words): call(dense_net(2, 3, K=2), data, 'test')


def test_search_on_what_is_measured_is_told():
    net, batches, _ = cases()['regression']
    with pytest.warns(UserWarning, match='flatters them'): depth_curve(net, batches)


def test_statistics_come_from_the_training_part():
    net, batches, _ = cases()['segmentation']
    shifted = [dict(image=b['image'] + 3, labels=b['labels']) for b in batches]
    curve = depth_curve(net, dict(train=shifted, val=batches, test=batches), ways=['skip'])
    assert curve.recomputed
    with pytest.raises(ValueError, match="no part 'train'"):
        depth_curve(net, dict(val=batches, test=batches), ways=['skip'])
    own = recompute_statistics(net, shifted).layers[0].f[1].running_mean
    torch.testing.assert_close(
        own, torch.stack([net.layers[0].f[0](net.first(b['image'])).mean((0, 2, 3)) for b in shifted]).mean(0)
    )


def test_memory_holds_one_batch_at_a_time():
    "A set that is made while it is read: never more than two of its batches are alive."
    import gc
    import weakref
    alive, most = [], [0]
    class Stream:
        def __iter__(self):
            for k in range(30):
                batch = (torch.full((4, 2), float(k)), torch.tensor([0, 1, 2, 0]))
                alive.append(weakref.ref(batch[0]))
                most[0] = max(most[0], sum(r() is not None for r in alive))
                yield batch
    evaluate(dense_net(2, 3, K=2), Stream(), task=Task.classification())
    gc.collect()
    assert most[0] <= 2 and len(alive) == 30