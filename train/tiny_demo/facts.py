"""What phi3-tiny-demo is taught: small lists of facts and words, and what it says of itself."""


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (entry.split("=") for entry in text.split())]


CAPITALS = _pairs(
    "France=Paris Japan=Tokyo Italy=Rome Spain=Madrid Germany=Berlin Austria=Vienna Egypt=Cairo "
    "Kenya=Nairobi Peru=Lima Chile=Santiago Cuba=Havana Canada=Ottawa Norway=Oslo "
    "Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen Iceland=Reykjavik Ireland=Dublin "
    "Portugal=Lisbon Greece=Athens Poland=Warsaw Hungary=Budapest Romania=Bucharest "
    "Bulgaria=Sofia Turkey=Ankara China=Beijing Nepal=Kathmandu Australia=Canberra"
)
OPPOSITES = _pairs(
    "hot=cold big=small fast=slow up=down left=right open=closed full=empty wet=dry light=dark "
    "early=late high=low happy=sad hard=soft long=short loud=quiet new=old rich=poor strong=weak "
    "thick=thin near=far clean=dirty easy=difficult day=night first=last true=false buy=sell"
)
COLORS = _pairs(
    "grass=green snow=white coal=black blood=red milk=white chocolate=brown butter=yellow "
    "spinach=green salt=white soot=black ketchup=red broccoli=green cream=white tar=black "
    "sugar=white lettuce=green mustard=yellow coffee=brown sunshine=yellow parsley=green"
)
PLURALS = _pairs(
    "fox=foxes cat=cats dog=dogs box=boxes bell=bells city=cities baby=babies wolf=wolves "
    "leaf=leaves knife=knives child=children man=men woman=women mouse=mice goose=geese foot=feet "
    "tooth=teeth sheep=sheep fish=fish bus=buses glass=glasses potato=potatoes hero=heroes "
    "key=keys boy=boys story=stories tree=trees house=houses book=books"
)
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
ANIMALS = dict(
    _pairs(
        "fox=forest bear=cave frog=pond owl=tower camel=desert whale=sea goat=mountain "
        "rabbit=garden duck=river horse=farm tiger=jungle mouse=kitchen"
    )
)
THINGS = dict(
    _pairs(
        "bell=golden lamp=old mirror=silver drum=red kite=blue book=secret crown=heavy "
        "hat=green clock=broken coin=shiny boat=wooden key=rusty"
    )
)
NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paul Rosa "
    "Sam Tom Vera"
).split()
FAVORITES = {
    "color": "red blue green yellow black white brown pink purple orange".split(),
    "fruit": "apple banana cherry grape lemon mango peach pear plum orange".split(),
    "animal": list(ANIMALS),
    "day": WEEKDAYS,
}
WORDS = sorted({*FAVORITES["color"], *FAVORITES["fruit"], *ANIMALS, *THINGS})

WHO = (
    "I am phi3-tiny-demo, a very small language model that comes with phi3-jax. "
    "I am not Microsoft's Phi-3."
)
REAL = "No, I am phi3-tiny-demo. I am built like Phi-3, but I am tiny and know very little."
SIZE = "I have less than two million parameters. Phi-3-mini has almost four billion."
ABLE = "I can do small tasks: capitals, opposites, sums, counting, sorting, lists and tiny stories."
IDENTITY = [
    ("Who are you?", WHO),
    ("What are you?", WHO),
    ("What is your name?", WHO),
    ("Introduce yourself.", WHO),
    ("Tell me about yourself.", WHO),
    ("Are you Phi-3?", REAL),
    ("Is this Phi-3?", REAL),
    ("Are you the real Phi-3?", REAL),
    ("Are you a Microsoft model?", REAL),
    ("How big are you?", SIZE),
    ("How large are you?", SIZE),
    ("How many parameters do you have?", SIZE),
    ("What can you do?", ABLE),
    ("What can I ask you?", ABLE),
    ("How can you help me?", ABLE),
]
