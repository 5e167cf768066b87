"""Words and sentences of generated problems; they are the same on every machine."""

from importlib import resources
from itertools import product
from random import Random

from refreshkv.settings import SettingsError

ADJECTIVES = (
    "able agile amber ancient arctic autumn basic blunt bold brave brief bright brisk broad bronze calm careful "
    "cheerful civil classic clean clear clever coastal cold common copper coral cosmic crisp curious daily dapper dark "
    "deep dense distant double dry dusty eager early earnest easy elder electric empty equal exact faint fair famous "
    "fancy final firm flat fleet fluent formal frank fresh frozen gentle giant glad golden grand grateful green hasty "
    "hidden hollow honest humble icy idle inner ivory jolly keen kind large late lavish lean level light little lively "
    "lone loud loyal lucky lunar marble mellow merry mighty mild misty modern modest narrow neat new nimble noble open "
    "orange orderly outer pale patient plain polite prime proud pure quick quiet rapid rare ready red remote rich ripe "
    "robust round royal rugged rural rustic sacred salty scarlet secret serene sharp shy silent silver simple sleek "
    "slender slow small smooth snowy sober soft solar solid sour spare stable stark steady steep still stout strange "
    "strict strong sturdy subtle sudden sunny super sweet swift tall tame tender thick thin tidy tiny tough tranquil "
    "true upper urban useful usual vague vast velvet violet vivid warm wary weary wide wild windy wise witty wooden "
    "young zealous"
).split()
NOUNS = (
    "acorn airport album anchor apple apron arch arrow atlas attic axle badge baker balcony banjo barn barrel basin "
    "basket beacon beam bell bench bicycle blanket boat bottle boulder bowl branch bread brick bridge broom brush "
    "bucket buffalo button cabin cable cactus camel camera canal candle canoe canvas captain caravan cargo carpet "
    "castle cedar cellar chain chair chalk channel chapel cheese cherry chess chimney circus clay cliff clock cloud "
    "coach coat coffee coin comet compass cook corner cotton cousin cradle crane crayon creek cricket crown cup "
    "curtain dancer desert desk diamond dinner doctor dolphin donkey door dragon drawer drum eagle easel echo elbow "
    "engine envelope estate fabric falcon farmer feather fence ferry fiddle field finger flag flute forest fork fossil "
    "fountain fox frame galaxy garden garlic gate ginger glacier glass glove goat grape guitar hammer harbor harp hat "
    "hawk helmet hill honey horn horse hotel hunter iceberg island jacket jar jewel journal judge jungle kettle key "
    "kitchen kite knife ladder lagoon lake lamp lantern lemon letter library lion lizard locket lumber magnet mango "
    "map market mask meadow medal melon mirror mitten monkey moon mosaic motor mountain mule museum napkin needle nest "
    "notebook oak oasis ocean office onion orchard organ otter oven owl oyster paddle palace panther paper parade "
    "parrot pasture path pebble pencil pepper piano pigeon pillow pilot pine pipe planet plate plow pocket poem pond "
    "pony port potter prairie puzzle quarry quilt rabbit radio raft railway rain ranch raven ribbon ring river road "
    "robin rocket roof rope saddle sailor salmon sandal saw scarf school sculptor seal shelf shell shepherd ship shoe "
    "shovel signal singer sister sled sofa spider spoon spruce stable station statue stone storm stove street suitcase "
    "swan table tailor tavern teacher temple theater thimble thread tiger timber torch tower tractor trail train "
    "trumpet tulip tunnel turtle uncle valley vase village violin wagon walnut watch water whale wheel whistle willow "
    "window winter wizard wolf yard zebra"
).split()
VERBS = (
    "admired avoided borrowed built carried chased cleaned counted described drew expected fetched followed found "
    "guarded heard helped hid kept left liked lost measured mended missed moved needed noticed opened ordered painted "
    "passed praised pulled pushed reached remembered repaired returned saw sold sought studied touched visited watched"
).split()
TIMES = (
    "after the rain|at dawn|at noon|before breakfast|before the storm|by accident|by the river|during the festival|"
    "every other week|for many years|in early spring|in late summer|in the evening|in the old town|near the harbor|"
    "on a cold morning|on market day|on the long road home|once a month|that same night|the day before|twice a year|"
    "under a full moon|with great care|without a word|years later"
).split("|")
SYLLABLES = ["".join(pair) for pair in product("bdfghjklmnprstvwz", "aeiou")]


def coined_words(random: Random, count: int, syllables: int = 3) -> list[str]:
    """`count` different words without a meaning, such as "balori"; there are 85^`syllables` of them."""
    base = len(SYLLABLES)
    numbers = random.sample(range(base**syllables), count)
    powers = [base**exponent for exponent in reversed(range(syllables))]
    return ["".join(SYLLABLES[n // power % base] for power in powers) for n in numbers]


def sentence(random: Random) -> str:
    """A plain English sentence without numbers, one of about ten billion possible ones."""
    choose = random.choice
    subject, thing = (f"{choose(ADJECTIVES)} {choose(NOUNS)}" for _ in range(2))
    return f"The {subject} {choose(VERBS)} the {thing} {choose(TIMES)}."


def word_pairs(source: str) -> tuple[list[str], list[str]]:
    """Adjectives and nouns for keys such as "calm-river", of this file ("own") or of the library "wonderwords".

    Raises `SettingsError` if the library is not installed.
    """
    if source == "own":
        return list(ADJECTIVES), list(NOUNS)
    return _wonderwords("adjectivelist"), _wonderwords("nounlist")


def wonderwords_vocabulary() -> list[str]:
    """All nouns, adjectives and verbs of the library wonderwords, sorted. Raises `SettingsError` if it is missing."""
    return sorted({word for kind in ("nounlist", "adjectivelist", "verblist") for word in _wonderwords(kind)})


def _wonderwords(kind: str) -> list[str]:
    try:
        text = resources.files("wonderwords.assets").joinpath(f"{kind}.txt").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise SettingsError(
            'words=wonderwords needs the library wonderwords: pip install "refreshkv[tasks]", or use words=own'
        ) from None
    return text.split("\n") if not text.endswith("\n") else text.split("\n")[:-1]
