"""On one process, training by a framework is the plain loop to the bit, and so is its resume."""

import contextlib
import io
import re

import pytest
import torch
import torch.nn.functional as F
from support.compare import differing, snapshot
from support.libraries.importing import EXAMPLES, example, importable
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from rlscuda import RLSOptimizer

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree"),
    # what a framework warns of has classes that need it, by which a parallel run would be stopped
    pytest.mark.filterwarnings("ignore", "error::UserWarning:rlscuda"),
]


def plain(model, optimizer, schedule, batches, loss_of):
    """The loop that a reader would write."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        schedule.step()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def covered(optimizer):
    return sum(row.status == "exact" for row in optimizer.coverage())


def assert_same(model, optimizer, other_model, other):
    values, expected = snapshot(model, optimizer), snapshot(other_model, other)
    assert any(name.endswith(".P") for name in values)
    assert not differing(values, expected)


def test_examples_print_coverage_and_learn():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        example("lightning_module").main(3, accelerator="cpu")
        example("accelerate_loop").main(3)
        example("transformers_trainer").main(2)
    printed = out.getvalue()
    accuracies = re.findall("accuracy (.*)", printed)
    assert len(accuracies) == 2 and min(map(float, accuracies)) > 0.85
    assert re.findall(r"(\d+) exact", printed) == ["2", "2", "14", "15"]
    losses = re.findall(r"^\w+: loss (.*), at the end (.*)$", printed, re.MULTILINE)
    assert len(losses) == 2 and all(float(last) < 0.9 * float(first) for first, last in losses)


def test_lightning(tmp_path):
    module, digits = example("lightning_module"), example("digits")
    with importable():
        from lightning.pytorch import Trainer
        from lightning.pytorch.callbacks import ModelCheckpoint
    train, _ = digits.splits()
    loader = DataLoader(train, 64)

    def fit(resumed=None):
        torch.manual_seed(0)
        model, keep = module.Digits(), ModelCheckpoint(tmp_path, save_top_k=-1)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, callbacks=[keep],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader, ckpt_path=resumed)
        return model, trainer.optimizers[0], trainer

    model, optimizer, trainer = fit()
    assert covered(optimizer) == 2
    updates = [v for name, v in trainer.callback_metrics.items() if name.endswith("/updates")]
    assert updates == [46, 46]
    torch.manual_seed(0)
    net = digits.network()
    other = RLSOptimizer(net, lr=0.2)
    plain(net, other, CosineAnnealingLR(other, 46), [*loader, *loader], cross_entropy)
    assert_same(model, optimizer, net, other)
    again = fit(tmp_path / "epoch=0-step=23.ckpt")
    assert again[2].global_step == 46
    assert_same(*again[:2], model, optimizer)


def test_accelerate(tmp_path):
    """Two halves of every minibatch are accumulated, in the example and in the plain loop."""
    loop, digits = example("accelerate_loop"), example("digits")
    model, optimizer = loop.main(2)
    assert covered(optimizer) == 2
    loop.set_seed(0)
    train, _ = digits.splits()
    net = digits.network()
    other, loader = RLSOptimizer(net, lr=0.2), DataLoader(train, 32, shuffle=True)
    schedule = CosineAnnealingLR(other, 45)
    for _ in range(2):
        for number, batch in enumerate(loader, 1):
            (cross_entropy(net, batch) / 2).backward()
            if number % 2 == 0 or number == len(loader):
                other.step()
                schedule.step()
                other.zero_grad()
    assert_same(model, optimizer, net, other)


def test_accelerate_resumes(tmp_path):
    loop, digits = example("accelerate_loop"), example("digits")
    data, _ = digits.splits()

    def prepared():
        torch.manual_seed(0)
        accelerator, net = loop.Accelerator(cpu=True), digits.network()
        optimizer = RLSOptimizer(net.parameters(), lr=0.2)
        schedule = CosineAnnealingLR(optimizer, 46)
        return accelerator, *accelerator.prepare(net, optimizer, schedule)

    def epoch(net, optimizer, schedule):
        plain(net, optimizer, schedule, DataLoader(data, 64), cross_entropy)

    accelerator, *whole = prepared()
    epoch(*whole)
    accelerator.save_state(tmp_path)
    epoch(*whole)
    accelerator, *again = prepared()
    accelerator.load_state(tmp_path)
    epoch(*again)
    assert_same(again[0], again[1].optimizer, whole[0], whole[1].optimizer)


@pytest.mark.parametrize(("name", "layers"), [("bert", 14), ("llama", 15)])
def test_transformers(name, layers, tmp_path):
    hf = example("transformers_trainer")
    with importable():
        from transformers import default_data_collator, get_cosine_schedule_with_warmup
    options = {
        "train_sampling_strategy": "sequential", "num_train_epochs": 2, "warmup_steps": 4,
        "max_grad_norm": 0, "save_strategy": "epoch", "use_cpu": True,
    }  # fmt: skip
    build = getattr(hf, name)
    trainer = hf.trainer_of(build, tmp_path, **options)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert covered(optimizer) == layers

    hf.set_seed(0)
    model, data = build()
    decayed = trainer.get_decay_parameter_names(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is decays],
         "weight_decay": decay}
        for decays, decay in ((True, 0.2), (False, 0.0))
    ]  # fmt: skip
    other = RLSOptimizer(groups, lr=0.05, model=model)
    schedule = get_cosine_schedule_with_warmup(other, 4, 32)
    loader = DataLoader(data, 32, collate_fn=default_data_collator)
    hf.set_seed(trainer.args.seed)
    batches = (batch for _ in range(2) for batch in loader)
    plain(model, other, schedule, batches, lambda model, batch: model(**batch).loss)
    assert_same(trainer.model, optimizer, model, other)

    again = hf.trainer_of(build, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert_same(again.model, again.optimizer.optimizer, trainer.model, optimizer)


def test_skorch(tmp_path):
    digits = example("digits")
    with importable():
        from skorch import NeuralNetClassifier
    x, y = digits.splits()[0].tensors

    def classifier():
        torch.manual_seed(0)
        return NeuralNetClassifier(
            digits.network, criterion=torch.nn.CrossEntropyLoss, optimizer=RLSOptimizer, lr=0.2,
            batch_size=64, train_split=None, iterator_train__shuffle=False, verbose=0,
        ).initialize()  # fmt: skip

    whole = classifier()
    for epoch in range(2):
        whole.partial_fit(x, y, epochs=1)
        if epoch == 0:
            whole.save_params(tmp_path / "net.pt", tmp_path / "optimizer.pt")
    assert covered(whole.optimizer_) == 2
    net = classifier().module_
    other = RLSOptimizer(net, lr=0.2)
    constant = torch.optim.lr_scheduler.ConstantLR(other, 1)
    batches = [*zip(x.split(64), y.split(64), strict=True)] * 2
    plain(net, other, constant, batches, cross_entropy)
    assert_same(whole.module_, whole.optimizer_, net, other)

    again = classifier()
    again.load_params(tmp_path / "net.pt", tmp_path / "optimizer.pt")
    again.partial_fit(x, y, epochs=1)
    assert_same(again.module_, again.optimizer_, net, other)
