"""The words of the demo model's language, by the part that each plays in a sentence.

No word plays two parts. The order of the words fixes the token ids of the shipped checkpoint
(`pass_keys.vocabulary`): a change here asks for a new model.
"""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GRAMMAR = _split("what code ? the a every of is . ,")
"""Words that the sentence patterns spell out; those before `the` appear in no filler."""

KEY_ADJECTIVES = _split(
    """
    amber azure beige black blue bronze brown copper coral cobalt crimson cyan ebony emerald golden
    gray green hazel indigo ivory jade khaki lavender lilac lime magenta maroon mauve navy ochre
    olive orange pearl pink plum purple red rose ruby rust saffron sapphire scarlet sepia silver tan
    teal turquoise umber vermilion violet white yellow striped spotted dotted checkered brave bold
    calm clever cheerful curious daring eager fearless fierce gentle graceful happy hasty honest
    humble jolly keen kind lively loyal lucky mighty modest nimble noble patient playful polite
    proud quick rapid restless royal sleepy sly smart solemn steady stern stubborn sturdy swift
    tender timid tireless vivid wild wise witty zealous frosty misty sunny stormy dusty velvet
    marble crystal cosmic lunar solar polar arctic alpine electric magnetic
    """
)

KEY_NOUNS = _split(
    """
    falcon otter badger beaver bear bison boar buffalo camel cheetah cobra condor cougar coyote
    crane cricket crocodile crow deer dingo dolphin donkey dove dragonfly duck eagle eel elephant
    elk emu ferret finch flamingo fox frog gazelle gecko gibbon giraffe goat goose gorilla
    grasshopper hamster hare hawk hedgehog heron hippo hornet horse hummingbird hyena ibex ibis
    iguana jackal jaguar jellyfish kangaroo kestrel koala lemur leopard lion lizard llama lobster
    lynx magpie manatee mantis marmot marten meerkat mole mongoose monkey moose moth mouse mule
    narwhal newt nightingale octopus opossum orca ostrich owl ox oyster panda panther parrot
    partridge peacock pelican penguin pheasant pigeon piranha platypus pony porcupine puffin puma
    python quail rabbit raccoon raven reindeer rhino robin salamander salmon scorpion seahorse seal
    shark sheep shrew shrimp
    """
)

CODES = tuple(f"{number:02d}" for number in range(100))

THINGS = _split(
    """
    river house garden road bridge window door kitchen table chair lamp book letter paper pencil
    picture story song music dance city town village street market shop store office school college
    library museum theater church tower castle palace farm field forest mountain hill valley lake
    ocean island beach harbor boat ship train bus car truck wagon bicycle plane airport station
    hotel restaurant hospital bank factory mill mine quarry tunnel canal path trail gate
    fence wall roof floor ceiling stair cellar attic room hall corner yard barn stable well fountain
    pond stream waterfall spring desert meadow orchard vineyard tree leaf branch root flower grass
    seed fruit apple pear cherry lemon grape melon berry nut bread butter cheese milk egg meat soup
    rice bean potato carrot onion pepper salt sugar honey tea coffee water juice wine plate cup
    glass bowl spoon fork knife pot pan oven stove fire smoke ash coal wood stone rock sand clay
    brick metal iron steel wire rope string thread cloth wool cotton silk leather shirt coat hat
    shoe boot glove scarf belt button pocket bag box basket bottle barrel bucket bell clock watch
    lock chain coin ring crown flag map sign ticket stamp parcel package gift card toy ball
    kite drum flute piano violin guitar mirror brush comb soap towel blanket pillow bed curtain
    carpet candle match hammer nail drill shovel rake ladder wheel engine motor machine pump
    pipe cable radio camera phone computer screen number word sentence page chapter lesson test
    question answer idea plan dream promise secret rule law vote speech debate meeting party wedding
    journey trip visit game race team player coach teacher student doctor nurse farmer
    baker painter writer singer actor sailor pilot driver soldier king queen prince judge lawyer
    mayor guard neighbor friend stranger child mother father sister brother uncle cousin family
    crowd morning evening night week month year summer winter autumn storm cloud rain snow wind
    thunder star planet
    """
)

QUALITIES = _split(
    """
    old new young big small large little long short tall wide narrow thick thin deep shallow high
    low heavy light hard soft hot cold warm cool dry wet clean dirty bright dark loud quiet fast
    slow early late good bad great fine rich poor strong weak full empty open closed round square
    flat sharp dull smooth rough sweet sour bitter fresh stale raw ripe busy lazy tired hungry
    thirsty angry sad glad famous common rare strange plain simple complex easy difficult public
    private local foreign ancient modern recent final single double broken perfect pretty ugly
    cheap expensive useful useless careful careless safe dangerous certain possible special usual
    wooden distant nearby hidden
    """
)

ACTIONS = _split(
    """
    walked ran stood sat slept worked played waited stayed lived moved turned looked watched
    listened talked laughed cried smiled sang danced jumped climbed fell rolled slid stopped started
    finished arrived left returned traveled wandered hurried rested ate drank cooked baked
    cleaned washed painted drew wrote read counted learned studied taught helped followed led met
    called asked answered told showed gave took brought carried pushed pulled lifted dropped threw
    caught held kept found lost hid searched chose bought sold paid built fixed broke cut burned
    shone grew changed appeared vanished remained belonged mattered floated sank swam sailed flew
    drove rode crossed passed reached touched tasted smelled heard saw remembered forgot noticed
    """
)

PLACES = _split(
    """
    near beside behind above below under over around across along against among between beyond
    inside outside through toward within without before after during until
    """
)

MANNERS = _split(
    """
    slowly quickly softly loudly quietly gently kindly proudly bravely calmly eagerly happily sadly
    gladly badly nicely neatly safely deeply highly nearly almost always never often sometimes
    seldom rarely usually mostly partly fully simply clearly surely maybe perhaps again already
    still soon later today tomorrow yesterday tonight there here everywhere nowhere together alone
    twice once outdoors indoors upstairs downstairs
    """
)
