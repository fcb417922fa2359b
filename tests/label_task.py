"""A task of examples with a label each, for tests of the loop."""

from types import SimpleNamespace

from torch.nn.functional import cross_entropy

from deftcore.training.task import Task


class LabelTask(Task):
    """What a model makes of the batch's tensor `of` are logits."""

    of: str

    def output(self, model, batch):
        logits = model(batch[self.of])
        return SimpleNamespace(logits=logits, loss=cross_entropy(logits, batch["label"]))

    def predictions(self, batch):
        return len(batch["label"])
