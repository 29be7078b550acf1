"""What is trained, on which pictures and how: from what was asked to what every worker is told."""

import fnmatch
import hashlib
import json
import math
import re
import uuid
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import yaml

import models
from models import Bundle, InputInfo
from models.parts.configs import did_you_mean
from models.training.balance import ClassCounts
from models.training.recipes import NAMED, Recipe
from pipeline.config import Batch, SegmentConfig
from pipeline.create import read_bundle
from pipeline.errors import RunRefused
from pipeline.labels import (
    LabelledItem,
    LabelledSet,
    fragments,
    hashed_share,
    in_order,
    open_labelled,
    read_mask,
    refuse_other_task,
)
from pipeline.ontology import Ontology
from pipeline.registry import resolve
from pipeline.splits import ALL, given_file
from pipeline.storage import Store, open_store
from pipeline.train_config import TrainConfig, Training
from pipeline.training import Work, steps_of
from pipeline.trainset import CARD_TILE, TrainSet
from pipeline.versions import parse

HELD_OUT = 0.1  # share of the pictures that is held out where nobody says which
LOOKS = 20  # at the pictures held out, in a training
COUNTERS = 8  # threads that read masks to count their classes


@dataclass(frozen=True, slots=True)
class Start:
    """What a training begins with."""

    card: Bundle
    """Of the model to be, without its recipe's mean and std."""
    parent: str | None = None
    """The bundle it goes on from, by a name that never means another."""
    version: str | None = None
    """The same as NAME/v0007, if it is in the registry that is published to."""


def opened(config: Training) -> LabelledSet:
    """The labelled pictures that it names, read once and checked."""
    return open_labelled(
        config.data, ontology=config.ontology, splits=config.splits, strata=config.strata
    )


def roles(config: TrainConfig, labelled: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """The pictures to learn from, and those to decide on."""
    plain = set(labelled.splits) == {ALL}
    split = config.split or (ALL if plain else "train")
    pool = labelled.only(split) if not plain or config.split else labelled
    look = _held_out(config, labelled, pool)
    keys = {item.key for item in look}
    learnt = [item for item in pool.items if item.key not in keys]
    if not learnt or not look:
        raise RunRefused(
            f"{labelled.name}: {len(learnt)} pictures to learn from and {len(look)} held out; "
            "both need some: label more, or choose others with --split and --held-out"
        )
    return labelled.among(learnt), labelled.among(look)


def _held_out(config: TrainConfig, labelled: LabelledSet, pool: LabelledSet) -> list[LabelledItem]:
    if not config.held_out and "val" in labelled.splits:
        return list(labelled.only("val").items)
    if not config.held_out:
        chosen = [item for item in pool.items if hashed_share(item.key, HELD_OUT, "held out")]
        return chosen or list(pool.items[:1])
    found: dict[str, LabelledItem] = {}
    for name in config.held_out:
        if name in labelled.splits:
            matches = list(labelled.only(name).items)
        else:
            matches = [item for item in pool.items if fnmatch.fnmatchcase(item.key, name)]
        if not matches:
            there = ", ".join(labelled.splits)
            raise RunRefused(f"--held-out {name}: no split ({there}) and no key matches it")
        found |= {item.key: item for item in matches}
    return list(found.values())


def start_of(config: TrainConfig, labelled: LabelledSet) -> Start:
    """An architecture, or a bundle to go on from."""
    start = _start_of(config, labelled.ontology)
    refuse_other_task(config.model, start.card.task, labelled)
    return start


def _start_of(config: TrainConfig, ontology: Ontology) -> Start:
    name, _, variant = config.model.partition(":")
    if name in models.names() or (config.architecture and name == config.architecture):
        return Start(_card(name, variant, _changes(config)["model"], ontology))
    version = resolve(config.model) if parse(config.model) is not None else None
    place = config.model if version is None else version.uri
    card = _read_card(config.model, place)
    try:
        bundle = Bundle.from_json(card)
    except ValueError as error:
        raise RunRefused(f"--model {config.model}: {error}") from error
    _refuse_others(config, bundle, ontology)
    own = version is not None and version.registry == open_store(config.out).uri
    return Start(bundle, place, version.path if version and own else None)


def _read_card(model: str, place: str) -> bytes:
    """model.json of a bundle; a mere word that is none was meant to be an architecture."""
    try:
        return read_bundle(place)[0]
    except RunRefused as error:
        word = model.partition(":")[0]
        if not re.fullmatch(r"\w+", word):
            raise
        raise RunRefused(
            f"--model {model}: no bundle there, and no architecture"
            f"{did_you_mean(word, models.names())}"
        ) from error


def _card(name: str, variant: str, options: dict[str, Any], ontology: Ontology) -> Bundle:
    """The card of a model that does not exist yet; recipe and figures come later."""
    if variant:
        variants = models.about(name).variants if name in models.names() else {}
        if variant not in variants:
            known = ", ".join(variants) or "none"
            raise RunRefused(f"--model {name}:{variant}: {name} has the variants {known}")
        options = {**variants[variant], **options}
    try:
        net = models.build(name, **{**options, "classes": len(ontology.classes)})
    except (ValueError, TypeError) as error:
        raise RunRefused(f"--model {name}: {error}") from error
    channels = net.config.channels
    return Bundle(
        architecture=name,
        config=net.config.to_json(),
        classes=ontology.classes,
        input=InputInfo(channels, (0.0,) * channels, (1.0,) * channels),
        stride=net.stride,
        receptive_field=net.receptive_field,
        tile=CARD_TILE,
        task=net.task,
        ignore_id=ontology.ignore_id,
        provenance={},
        metrics={},
    )


def _refuse_others(config: TrainConfig, card: Bundle, ontology: Ontology) -> None:
    if card.architecture == "onnx":
        raise RunRefused(f"--model {config.model} is ONNX, which only predicts; train its source")
    mine, theirs = {entry.name for entry in card.classes}, set(ontology.names)
    if mine != theirs:
        raise RunRefused(
            f"--model {config.model} knows {', '.join(sorted(mine))}; the labels have "
            f"{', '.join(sorted(theirs))}. Classes are matched by name: give --ontology with the "
            "model's names, or train an architecture from nothing"
        )
    if _changes(config)["model"]:
        raise RunRefused(
            "--set model.… builds another model; --model is a bundle and stays as it is"
        )


def _changes(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """--set, as nested values for the recipe and for the model."""
    recipe: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for change in config.set:
        key, sign, text = change.partition("=")
        if not sign:
            raise RunRefused(f"--set {change}: write KEY=VALUE, as rate.peak=1e-3")
        target, path = (model, key[6:]) if key.startswith("model.") else (recipe, key)
        *outer, last = path.split(".")
        try:
            for step in outer:
                target = target.setdefault(step, {})
            target[last] = _value(text)
        except (yaml.YAMLError, AttributeError, TypeError) as error:
            raise RunRefused(
                f"--set {change}: cannot be understood; write KEY=VALUE, as rate.peak=1e-3 or "
                "augment.size=[256,256]"
            ) from error
    return {"recipe": recipe, "model": model}


def _value(text: str) -> Any:  # noqa: ANN401 - whatever the recipe takes
    try:
        return json.loads(text)
    except ValueError:
        value = yaml.safe_load(text) if text[:1] in "[{" else text
        return float(text) if _is_number(text) else value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def recipe_text(config: Training) -> str:
    """The recipe that is named, before its changes, as JSON or YAML."""
    if config.recipe in NAMED:
        return json.dumps(NAMED[config.recipe]().to_json())
    if config.recipe.endswith((".json", ".yaml", ".yml")):
        return given_file(config.recipe)[0].decode("utf-8", "replace")
    raise RunRefused(
        f"--recipe {config.recipe} is none of {', '.join(NAMED)} and no .json or .yaml file"
    )


def _parsed(text: str) -> object:
    """JSON first: YAML takes its 1e-05 for a word."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def recipe_of(config: TrainConfig, card: Bundle, ontology: Ontology) -> Recipe:
    """The recipe by name or file, with the changes; pixels as the model reads them."""
    try:
        said = _parsed(recipe_text(config))
        if not isinstance(said, dict):
            raise RunRefused(f"--recipe {config.recipe} must hold names and values")
        recipe = Recipe.from_json(_merged(said, _changes(config)["recipe"]))
    except (ValueError, yaml.YAMLError) as error:
        raise RunRefused(f"--recipe {config.recipe}: {error}") from error
    if card.weights_sha256:  # it exists, and reads pixels as it always did
        recipe = replace(recipe, mean=card.input.mean, std=card.input.std)
        if card.input.resize is not None:
            recipe = replace(recipe, augment=replace(recipe.augment, size=card.input.resize))
    _refuse_unfit(recipe, card)
    return replace(recipe, ignore_id=ontology.ignored)


def _refuse_unfit(recipe: Recipe, card: Bundle) -> None:
    """Refuse one number per channel or class where the model has more of them, or fewer."""
    channels, weights = card.input.channels, recipe.loss.class_weights
    if len(recipe.mean) not in {1, channels}:
        raise RunRefused(
            f"mean and std of the recipe are {len(recipe.mean)} numbers, the model reads "
            f"{channels} channels; try --set mean=[0.45] --set std=[0.23]"
        )
    if not isinstance(weights, str) and len(weights) != len(card.classes):
        raise RunRefused(
            f"loss.class_weights are {len(weights)} numbers for {len(card.classes)} classes; "
            "try --set loss.class_weights=median_frequency"
        )
    if card.task == "classify" and (recipe.loss.dice or recipe.loss.lovasz):
        raise RunRefused(
            "loss.dice and loss.lovasz are of masks; --set loss.dice=0 --set loss.lovasz=0 for a "
            "classifier"
        )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


# ------------------------------------------------------------------------------------ its identity


def identity_of(
    config: TrainConfig,
    learnt: LabelledSet,
    look: LabelledSet,
    start: Start,
    recipe: Recipe,
) -> dict[str, Any]:
    """What makes it this training and no other."""
    said = {
        "name": config.name,
        "model": {"architecture": start.card.architecture, "config": start.card.config},
        "parent": start.card.sha256 if start.parent else None,
        "data_sha256": learnt.sha256,
        "held_out_sha256": look.sha256,
        "ontology_sha256": learnt.ontology.sha256,
        "recipe": recipe.to_json(),
    }
    text = json.dumps(said, sort_keys=True).encode()
    about = {
        "data": config.data,
        "parent_bundle": start.parent,
        "parent_version": start.version,
        "learnt": len(learnt.items),
        "held_out": len(look.items),
    }
    return {**said, "sha256": hashlib.sha256(text).hexdigest(), "about": about}


def balanced(recipe: Recipe, learnt: LabelledSet) -> Recipe:
    """With class weights as numbers, if the recipe wants them from the labels."""
    if recipe.loss.class_weights != "median_frequency":
        return recipe
    ontology = learnt.ontology
    if learnt.task == "classify":  # one picture of so many pixels: frequencies of all labels
        counts = ClassCounts(len(ontology.classes), ontology.ignored)
        counts.add(np.array([ontology.names.index(item.label) for item in learnt.items]))
        return recipe.balanced(counts)

    def counted(items: list[LabelledItem]) -> ClassCounts:
        counts = ClassCounts(len(ontology.classes), ontology.ignored)
        for mask in learnt.loader.encoded_masks(items, 1):
            counts.add(ontology.indexes(read_mask(mask)))
        return counts

    total = ClassCounts(len(ontology.classes), ontology.ignored)
    for counts in in_order(counted, fragments(learnt.items), COUNTERS):
        total.merge(counts)
    return recipe.balanced(total)


def parts_of(config: TrainConfig, recipe: Recipe) -> int:
    """The parts of a step, which any number of workers that there may be can share."""
    least = config.least_workers or config.workers
    if least > config.workers:
        raise RunRefused(f"--least-workers {least} exceeds --workers {config.workers}")
    parts = reduce(math.lcm, range(least, config.workers + 1)) * recipe.accumulate
    if recipe.batch % parts:
        raise RunRefused(
            f"a batch of {recipe.batch} cannot be shared in {parts} equal parts by {least} to "
            f"{config.workers} workers; try --set batch={-(-recipe.batch // parts) * parts}"
        )
    return parts


def job_of(
    config: TrainConfig,
    store: Store,
    start: Start,
    learnt: LabelledSet,
    look: LabelledSet,
    recipe: Recipe,
) -> Work:
    """What every worker must know."""
    channels = start.card.input.channels
    mean, std = (part * channels if len(part) == 1 else part for part in (recipe.mean, recipe.std))
    card = replace(
        start.card,
        classes=start.card.classes,
        input=replace(start.card.input, mean=mean, std=std, resize=_resize(start, recipe)),
        provenance={"recipe": recipe.to_json(), "training": store.uri.rpartition("/")[2]},
        metrics={},
        weights_sha256="",
    )
    return Work(
        uri=store.uri,
        call=f"call-{uuid.uuid4().hex[:12]}",
        card=card,
        parent=start.parent,
        architecture=config.architecture,
        train=TrainSet.of(learnt.items, learnt.loader, recipe, card),
        look=look.items,
        asked=_asked(config, learnt),
        parts=parts_of(config, recipe),
        every=config.every or max(1, steps_of(recipe, len(learnt.items)) // LOOKS),
        threads=config.threads,
    )


def _resize(start: Start, recipe: Recipe) -> tuple[int, int] | None:
    """A classifier reads pictures, ever after, at the size at which it was trained."""
    new = start.card.task == "classify" and start.parent is None
    return recipe.augment.size if new else start.card.input.resize


def _asked(config: TrainConfig, labelled: LabelledSet) -> SegmentConfig:
    """What a run over the pictures held out would be asked for."""
    return SegmentConfig(
        source=labelled.loader.images,
        out=f"{labelled.loader.images}.never-written",
        model="demo",  # no bundle yet: scorers are handed its bytes
        batch=Batch(pixels=CARD_TILE.size**2),  # a probe at every look would take longer than it
        architecture=config.architecture,
        compute=config.compute,
    )
