"""English-like prose without end, drawn from a grammar of our own.

Words and sentence shapes were written for this project. The text says nothing; it is there to be read past.
The same seed gives the same text on every machine, since only `Random.random` is used. Knows nothing about
facts.
"""

from random import Random

WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "noun": """harbour kettle ledger orchard lantern bridge garden letter engine market river
            mill basket ladder window clock carpet village meadow barn chapel ferry wagon
            bottle compass drawer mirror candle bench fence roof cellar staircase corridor
            gate tower well pond hedge field furrow plough anvil hammer chisel needle thread
            ribbon blanket pillow curtain jug saucer plate spoon knife loaf cheese apple pear
            plum cherry walnut barley wheat oat clover thistle fern moss pebble boulder cliff
            valley ridge marsh dune island lagoon reef current tide storm breeze cloud rainbow
            shadow sunrise evening winter summer season festival concert poem novel chapter
            sketch portrait statue violin trumpet drum melody chorus rehearsal lesson lecture
            library archive museum gallery theatre station platform carriage timetable ticket
            passport suitcase umbrella raincoat scarf glove button pocket purse coin receipt
            invoice contract auction bargain debt wage pension committee council petition
            election speech rumour promise apology quarrel journey shortcut crossing signpost
            milestone map atlas telescope microscope battery circuit antenna turbine pump
            valve pipe boiler furnace chimney brick plank beam rafter hinge bolt spring pulley
            lever wheel axle saddle bridle kennel sparrow heron otter badger hedgehog salmon
            trout beetle moth spider pony goat terrier""",
        "people": """farmer baker carpenter sailor teacher doctor nurse clerk miller shepherd printer
            painter gardener fisherman captain porter conductor librarian watchmaker tailor
            cobbler glazier potter weaver blacksmith surveyor engineer architect lawyer judge
            mayor councillor journalist photographer musician singer dancer poet novelist
            critic student apprentice traveller stranger neighbour cousin uncle aunt
            grandmother widow orphan innkeeper cook waiter butcher grocer pharmacist chemist
            botanist geologist astronomer historian translator typist courier driver mechanic
            pilot radio-operator lighthouse-keeper beekeeper gamekeeper ferryman schoolmaster
            bookseller accountant inspector constable sergeant""",
        "name": """Agnes Albert Alma Arthur Beatrice Bernard Bridget Cecil Clara Conrad Cora Daniel
            Dorothy Edgar Edith Eleanor Elias Emil Esther Felix Flora Francis Frida Gerald
            Gilbert Gloria Greta Harold Harriet Hector Helen Henrik Hilda Horace Hugo Ida
            Ingrid Irene Isaac Ivor Jasper Joan Jonas Judith Julia Karl Katrin Leon Leonard
            Lillian Linus Louisa Lucy Mabel Magnus Margot Martha Martin Matilda Maurice Miriam
            Morris Nadia Nancy Nathan Nora Olive Oscar Otto Pauline Percy Philip Rachel Ralph
            Rosa Rupert Ruth Samuel Selma Sidney Silas Simon Stella Sylvia Theodore Thora
            Ursula Vera Victor Viola Walter Wilfred Winifred""",
        "surname": """Abbot Aldridge Ashby Barlow Beckett Birch Blackwood Bowen Bramley Carver Chandler
            Cole Corbett Crane Dalton Dexter Drummond Eastwood Ellery Fairfax Farrow Fenton
            Fletcher Forrester Garland Gibbs Grantham Hale Harding Hartley Hawthorne Holt
            Hurst Ingram Jarvis Keating Kirby Lambert Lang Lockwood Marlow Mercer Milford
            Naylor Norris Oakley Osborne Palmer Paxton Pemberton Quill Radford Ramsey Redfern
            Rowan Sawyer Selby Sharp Shelton Stanton Stroud Tanner Thorne Tilden Upton Vance
            Walden Warwick Webb Whitlock Winslow Yardley""",
        "place_head": """Ash Black Bright Brook Castle Clay Cold Cran Deep Eagle East Elm Fair Fox Glen
            Gold Green Hart Hazel High Holly Iron King Lake Lang Long Maple Marsh Mill Moor
            New North Oak Old Pine Raven Red River Rock Rose Salt Sand Silver South Stone Swan
            Thorn West White Wind Wolf Wood""",
        "place_tail": """borough bridge bury by cliff combe cote dale den don field ford gate ham haven
            hill holm hurst land leigh ley mere mill minster mouth port ridge shaw side stead
            stoke stow ton vale view wall water well wick wood worth""",
        "adjective": """old quiet narrow heavy bright pale dusty broken patient careful crooked gentle
            hollow frozen distant ordinary curious generous stubborn cheerful anxious clever
            clumsy faithful famous foreign fragile graceful grey green blue crimson golden
            silver wooden copper iron woollen painted polished rusty ruined empty crowded
            silent noisy sudden gradual ancient modern early late bitter sweet sour salty
            fresh stale damp dry warm cool steep shallow deep wide slender round square hidden
            open locked forgotten familiar unlikely reliable doubtful honest secret public
            private humble proud weary restless idle busy local northern southern eastern
            western temporary permanent expensive cheap valuable useless remarkable peculiar
            modest enormous tiny splendid dreadful simple complicated well-kept half-finished
            weather-beaten hand-made second-hand much-loved""",
        "past": """carried repaired counted described painted measured borrowed returned noticed
            ignored remembered forgot admired cleaned polished opened closed locked moved
            lifted dropped followed watched photographed sketched inspected sold bought traded
            hid found lost guarded abandoned restored replaced weighed wrapped unpacked
            delivered collected examined recorded mentioned praised criticised defended mended
            tested rebuilt dismantled labelled surveyed covered uncovered turned pushed pulled
            washed dried sharpened""",
        "base": """carry repair count describe paint measure borrow return notice ignore remember
            forget admire clean polish open close lock move lift drop follow watch photograph
            sketch inspect sell buy trade hide find lose guard abandon restore replace weigh
            wrap unpack deliver collect examine record mention praise criticise defend mend
            test rebuild dismantle label survey cover uncover turn push pull wash dry""",
        "went": """walked hurried drifted travelled wandered climbed crept marched sailed rode cycled
            strolled limped ran turned returned""",
        "said": """said answered whispered explained insisted admitted remarked replied announced
            complained muttered suggested warned repeated wrote thought agreed argued""",
        "adverb": """slowly quickly carefully quietly rarely often always never usually suddenly
            gradually politely reluctantly gladly secretly openly early late twice again
            eventually finally barely nearly certainly perhaps evidently apparently
            fortunately regrettably patiently steadily loudly softly""",
        "preposition": """near behind beyond beside above below under across along past opposite inside
            outside towards against around""",
        "time": """yesterday today tomorrow tonight afterwards meanwhile later earlier lately
            nowadays once beforehand""",
        "month": "January February March April May June July August September October November December",
        "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "number": """two three four five six seven eight nine ten eleven twelve thirteen fifteen
            sixteen twenty thirty forty fifty sixty eighty ninety""",
        "plural": """letters barrels crates apples lanterns horses carts sheep tickets pages maps
            bricks planks coins ribbons bottles baskets stamps keys candles stones rows tables
            chairs windows doors bells flags ropes nets boats oars wheels gears springs pipes
            tiles seeds bulbs saplings recipes songs stories rumours complaints visitors
            passengers pupils workers musicians soldiers swallows geese cattle""",
        "mass": """bread flour milk butter honey tea coffee sugar salt pepper oil coal timber wool
            linen leather paper ink glue paint varnish sand gravel clay slate straw hay wax
            soap rope wire dust smoke fog snow frost rain gossip patience courage luck advice""",
        "abstract": """reason doubt habit custom mistake plan idea opinion secret difficulty advantage
            tradition question answer proposal delay accident coincidence method rule
            exception principle consequence intention memory impression suspicion disagreement
            improvement decision""",
        "linking": """however therefore besides nevertheless moreover otherwise still instead likewise
            consequently meanwhile indeed""",
        "conjunction": "because although while until since unless whenever before after though",
        "unit": "miles yards pounds gallons shillings hours minutes days weeks months acres bushels",
    }.items()
}

SHAPES: tuple[str, ...] = (
    "The {adjective} {noun} stood {preposition} the {noun}, and nobody {past} it.",
    "{name} {surname} {past} the {noun} {adverb}, {conjunction} a {people} had {past} a {adjective} {noun}.",
    "On {weekday} the {people} {went} from {place} to {place} with {number} {plural}.",
    "It was {time} that the {people} {past} a {adjective} {noun} {preposition} the {noun}.",
    '"The {noun} is {adjective}," {said} {name}, "and the {noun} is {adjective} too."',
    "There were {number} {plural} {preposition} the {noun}, {number} of them {adjective}.",
    "{name} {said} that the {people} of {place} would {adverb} {base} the {noun}.",
    "In {month} {year} the {noun} at {place} was {past} and {past} {adverb}.",
    "Nobody in {place} could {base} the {adjective} {noun} {conjunction} the {mass} ran out.",
    "The {people} asked for {mass}, {mass} and {mass}; the {people} brought {number} {plural}.",
    "{linking_cap}, the {abstract} was {adjective}, and {name} {said} so.",
    "What the {people} {past} {preposition} the {noun} was only a {noun}, {adjective} and {adjective}.",
    "A {noun} costs {small} {unit} in {place}, but a {adjective} one costs {small}.",
    "{name} and {name} {went} {preposition} the {noun} until {hour}, then {past} the {plural}.",
    "Some {plural} are {adjective}; others, like those of {place}, are {adjective}.",
    "If the {people} had {past} the {noun}, the {abstract} would have been {adjective}.",
    "The {noun} of the {people} is {small} {unit} from the {noun} of the {people}.",
    "Every {month} the {people} {past} {small} {plural} and {past} the {mass}.",
    "{name} {surname}, a {people} from {place}, {adverb} {past} the {adjective} {noun}.",
    '"Did you {base} the {noun}?" asked {name}. "{adverb_cap}," {said} {name}.',
    "The {abstract} of the {people} was that the {noun} should be {past} before {weekday}.",
    "No {abstract} is as {adjective} as the {abstract} of a {adjective} {people}.",
    "After the {noun} had been {past}, {name} {went} to {place}, where the {mass} was {adjective}.",
    "They {past} the {noun}, the {noun} and the {adjective} {noun}, but {adverb} the {noun}.",
    "The road from {place} passes {preposition} a {noun}, a {noun} and {number} {adjective} {plural}.",
    "{linking_cap}, {small} {plural} were {past} in {year}, more than in {year}.",
    "{name} wanted to {base} the {mass}; {name} preferred to {base} the {plural}.",
    "At {hour} the {noun} was {adjective}, {conjunction} the {people} {adverb} {past} it.",
    "Few {people_plural} {base} a {noun} {conjunction} the {noun} is {adjective}.",
    "Who {past} the {adjective} {noun} {preposition} {place}, and with what {abstract}?",
    "The {people} kept {mass} in the {noun}, {mass} in the {noun}, and {number} {plural} {preposition} both.",
    "{time_cap}, {name} {said}, the {noun} will be {adjective} again.",
    "A letter from {name} {surname} of {place} mentioned the {noun}, {number} {plural} and a {abstract}.",
    "Between {place} and {place} there is {adverb} a {noun} that the {people} would {base}.",
    "The {adjective} {people} {went} {preposition} the {noun}; the {adjective} one stayed.",
    "It takes {number} {unit} to {base} a {noun}, and {number} more to {base} the {mass}.",
)


def _derived() -> dict[str, tuple[str, ...]]:
    """Slots that follow from the word lists: capitalised forms, places, plurals of people, figures."""
    words = dict(WORDS)
    for name in ("linking", "adverb", "time"):
        words[f"{name}_cap"] = tuple(word.capitalize() for word in WORDS[name])
    words["place"] = tuple(head + tail for head in WORDS["place_head"] for tail in WORDS["place_tail"])
    words["people_plural"] = tuple(
        f"{word}s" for word in WORDS["people"] if not word.endswith(("man", "s", "y"))
    )
    words["year"] = tuple(str(year) for year in range(1700, 2000))
    words["small"] = tuple(str(count) for count in range(2, 120))
    clock = ("o'clock", "in the morning", "in the evening", "at night")
    words["hour"] = tuple(f"{hour} {part}" for hour in WORDS["number"][:11] for part in clock)
    return words


def _split(shape: str, words: dict[str, tuple[str, ...]]) -> list[str | tuple[str, ...]]:
    """A shape as literals and word lists, alternating."""
    parts: list[str | tuple[str, ...]] = []
    for piece in shape.split("{"):
        slot, brace, rest = piece.partition("}")
        parts += [words[slot], rest] if brace else [slot]
    return [part for part in parts if part]


_PARTS = [_split(shape, _derived()) for shape in SHAPES]


def sentence(rng: Random) -> str:
    """One sentence, 40 to 140 characters."""
    draw = rng.random
    parts = _PARTS[int(draw() * len(_PARTS))]
    return "".join([part if type(part) is str else part[int(draw() * len(part))] for part in parts])


def prose(rng: Random, size: int) -> str:
    """Exactly `size` characters of ASCII prose: paragraphs of a few sentences, the last one cut off."""
    pieces: list[str] = []
    length = 0
    while length < size:
        line = sentence(rng)
        gap = "\n\n" if rng.random() < 0.15 else " "
        pieces += [line, gap]
        length += len(line) + len(gap)
    return "".join(pieces)[:size]
