"""Words that keys are made of: `brave-lantern`. Fixed lists, so that the same seed gives the same prompt anywhere."""

import random
import uuid


def listed(text: str) -> tuple[str, ...]:
    """The words of a text, as a list that can be read."""
    return tuple(text.split())


ADJECTIVES = listed(
    """
    able amber ancient ardent autumn azure bare bitter blank blue bold brave brief bright brisk broad bronze calm candid
    careful cheap clean clear clever cold coral cosy crimson crisp curious damp dark dear deep distant double dry dull
    dusty eager early earnest easy elder empty even faint fair famous fast fierce final fine firm flat fleet fond formal
    frank fresh frosty full gentle giant glad golden good grand grave great green happy hardy harsh hasty heavy hidden
    high hollow honest humble icy idle iron ivory jolly keen kind large late lazy level light little lively local lone
    long loud loyal lucky mellow merry mighty mild modest narrow neat new noble odd old open pale patient plain polite
    proud pure quick quiet rapid rare ready rich ripe rosy rough round royal rustic sandy secret shady sharp shiny short
    shy silent silver simple sleepy slim slow small smooth snowy soft solid sour spare stable steady steep still stout
    strange strict strong sturdy subtle sudden sunny sweet swift tall tame tender thick tidy tiny tough true vast velvet
    vivid warm weary wide wild windy wise witty wooden young zealous
    """
)
NOUNS = listed(
    """
    acorn anchor antler apple apron arrow badge bakery banner barley barrel basin basket beacon beaver bell bench berry
    blanket blossom boat bottle boulder branch bridge brook broom bucket button cabin camel candle canoe canyon carpet
    castle cedar cellar chapel cherry chimney circle clock cloud coast comet compass copper cottage cradle crane creek
    cricket crown curtain daisy desert dolphin door dragon drawer drum eagle easel elbow ember engine falcon farmer
    feather fence ferry field fiddle finch flag flame flask flute forest fossil fountain fox galaxy garden garlic gate
    glacier glove goose grain granite grape guitar hammer harbor harp hawk hazel hedge helmet heron hill honey horizon
    horse inn island jacket jar jewel jungle kettle key kitchen kite ladder lagoon lake lamp lantern lark laurel leaf
    ledge lemon lily lion locket lodge loom lynx magnet maple marble market meadow melon mill mirror mitten monkey moon
    mosaic moss moth mountain mule museum needle nest oak oar oasis ocean olive onion orchard otter oven owl paddle
    palace panther parcel parrot path pearl pebble pencil pepper piano pigeon pillow pine planet plum pocket pond poppy
    potter prairie quarry quilt rabbit raft raven reef ribbon river robin rocket rope sailor salmon scarf school shell
    shepherd ship shovel spider spoon spruce stable star stone stream street tailor temple thistle thunder ticket tiger
    timber tower trumpet tulip tunnel turtle valley village violin wagon walnut water wheel whistle willow window winter
    wolf yarn zebra
    """
)


def random_word(rng: random.Random) -> str:
    """An adjective and a noun, as RULER's keys are."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def random_number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


RANDOM = {"words": random_word, "numbers": random_number, "uuids": random_uuid}


def distinct(rng: random.Random, kind: str, count: int) -> list[str]:
    """`count` different words, numbers or uuids."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[RANDOM[kind](rng)] = None
    return list(chosen)
