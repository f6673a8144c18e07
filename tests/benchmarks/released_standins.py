"""Stand-ins for the code that HVP's authors released: the interfaces that we call, with the plainest selection behind
them. The text of each file, by method."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

PICK = """
import torch

def pick(images, score, lists):
    # images[v][b]; score [C, B], the highest wins; lists [C, S]
    best = torch.as_tensor(lists)[score.argmax(0)].T
    every = torch.arange(best.shape[1])
    out = [torch.stack([images[v][b] for b, v in zip(every.tolist(), row.tolist())]) for row in best]
    return out, best, score.max(0).values
"""

SIMSIAM = {
    "pick.py": PICK,
    "select_crops.py": """
import itertools, torch
from pick import pick

def select_crops_cross(images, model, fp16):
    p, z = (x.unflatten(0, (len(images), -1)) for x in model.module.single_forward(torch.cat(images)))
    p, z = (x / x.norm(dim=-1, keepdim=True) for x in (p, z))
    lists = list(itertools.combinations(range(len(images)), 2))
    alike = torch.stack([0.5 * (p[a] * z[b] + p[b] * z[a]).sum(-1) for a, b in lists])
    (one, other), chosen, score = pick(images, -alike, lists)
    return one, other, chosen, -score
""",
}

SIMCLR = {
    "pick.py": PICK,
    "hvs/__init__.py": """
import itertools, torch
from pick import pick

def adversarial_crop_selection(images, model, criterion):
    z = model(torch.cat(images)).unflatten(0, (len(images), -1))
    lists = list(itertools.combinations(range(len(images)), 2))
    return pick(images, torch.stack([criterion.of_pair(z[a], z[b]) for a, b in lists]), lists)
""",
    "losses/__init__.py": """
import torch

class NTXentLoss:
    def __init__(self, temperature):
        self.temperature = temperature

    def of_pair(self, a, b):
        both = torch.cat([a, b])
        both = both / both.norm(dim=1, keepdim=True)
        each = []
        for i, row in enumerate(both):
            logits = both @ row / self.temperature
            others = torch.cat([logits[:i], logits[i + 1:]])
            each.append(others.logsumexp(0) - logits[(i + len(a)) % len(both)])
        return torch.stack(each).unflatten(0, (2, -1)).sum(0)
""",
}

DINO = {
    "pick.py": PICK,
    "pretrain.py": """
import random, torch
from pick import pick

def index_generator(args):
    first, count = args.num_global_crops_loader, args.num_local_crops_loader
    for _ in range(args.limit_comparisons):
        local = random.sample(range(first, first + count), args.local_crops_number)
        yield [2 * random.randrange(first // 2), 2 * random.randrange(first // 2) + 1] + local

def hvs(images, student, teacher, criterion, epoch, args):
    logits = teacher(images[:args.num_global_crops_loader])
    s, t = (x.unflatten(0, (-1, len(images[0]))) for x in (student(images), logits))
    lists = list(index_generator(args))
    matrix = criterion.matrix(s, t, epoch)
    score = [sum(matrix[t, v] for t in one[:2] for v in one if t != v) for one in lists]
    return pick(images, torch.stack(score), lists)
""",
    "utils/dino.py": """
import torch

class DINOLoss:
    def __init__(self, out_dim, ncrops, warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs):
        self.center = torch.zeros(1, out_dim)
        self.temps = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)

    def matrix(self, student, teacher, epoch):
        targets = torch.softmax((teacher - self.center) / self.temps[epoch], -1)
        return -torch.einsum("tbk,vbk->tvb", targets, torch.log_softmax(student / 0.1, -1))
""",
}

IBOT = {
    "pick.py": PICK,
    "main_ibot.py": """
import itertools, tensorboardX, torch
from pick import pick

class iBOTLoss(torch.nn.Module):
    def __init__(self, k, k2, ngcrops, nlcrops, a, b, a2, b2, warmup, epochs, args, lambda1, lambda2):
        super().__init__()
        self.center, self.center2 = torch.zeros(1, k), torch.zeros(1, 1, k2)
        self.temps, self.temps2 = torch.linspace(a, b, warmup), torch.linspace(a2, b2, warmup)
        self.weights, self.args = (lambda1, lambda2), args

    def hvs(self, student, teacher, local, masks, epoch):
        split, num_global = (-1, len(masks[0])), self.args.gcrops_num_loader
        s = torch.cat([student[0], local]).unflatten(0, split)
        t, t2, s2 = (x.unflatten(0, split) for x in (*teacher, student[1]))
        t = ((t - self.center) / self.temps[epoch]).softmax(-1)
        t2 = ((t2 - self.center2) / self.temps2[epoch]).softmax(-1)
        cls = -torch.einsum("tbk,vbk->tvb", t, torch.log_softmax(s / 0.1, -1))
        each = -(t2 * torch.log_softmax(s2 / 0.1, -1)).sum(-1)
        marks = torch.stack(masks[:num_global]).flatten(2).float()
        patch = (each * marks).sum(-1) / marks.sum(-1).clamp(min=1)
        evens, odds = range(0, num_global, 2), range(1, num_global, 2)
        self.lists = [[a, b, *range(num_global, len(masks))] for a, b in itertools.product(evens, odds)]
        score = []
        for one in self.lists:
            pairs = [cls[t, v] for t in one[:2] for v in one if t != v]
            both = sum(pairs) / len(pairs), (patch[one[0]] + patch[one[1]]) / 2
            score.append(self.weights[0] * both[0] + self.weights[1] * both[1])
        self.score = torch.stack(score)
        return self.score.max(0).values, None

def hard_view_selection(teacher, student, loss, images, masks, epoch, args):
    num_global = args.gcrops_num_loader
    shown = student(images[:num_global], mask=masks[:num_global])
    loss.hvs(shown, teacher(images[:num_global]), student(images[num_global:])[0], masks, epoch)
    out, best, _ = pick(images, loss.score, loss.lists)
    return out, pick(masks, loss.score, loss.lists)[0][:2]
""",
}

STANDINS = {"dino": DINO, "ibot": IBOT, "simsiam": SIMSIAM, "simclr": SIMCLR}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def repository(folder: Path, files: Mapping[str, str]) -> str:
    """Create a repository whose branch `other`, not checked out, has the files. Return the commit."""
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    git(folder, "switch", "-q", "-c", "other")
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "files")
    commit = git(folder, "rev-parse", "HEAD")
    git(folder, "switch", "-q", "main")
    return commit
