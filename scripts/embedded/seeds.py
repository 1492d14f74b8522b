"""What the sampled reviews are about, and examples that show a 135M model what a review looks like."""

# Common things, so that the words that a review of them needs are common too.
THINGS = """
a toaster, a kettle, a coffee machine, a blender, a microwave, a fridge, an oven, a dishwasher, a washing
machine, a vacuum cleaner, an iron, a heater, a fan, a lamp, a clock, a frying pan, a knife, a set of
plates, a mug, a lunch box, a water bottle, a chair, a desk, a sofa, a bed, a mattress, a pillow, a blanket,
a carpet, a bookshelf, a mirror, a candle, a shower curtain, a towel, a phone, a laptop, a tablet, a camera,
a printer, a keyboard, a computer mouse, a television, a radio, a speaker, a pair of headphones, a smart
watch, a phone case, a charger, a game console, a video game, a board game, a card game, a puzzle, a
children's toy, a doll, a kite, a bicycle, a scooter, a skateboard, a helmet, a football, a tennis racket, a
yoga mat, a tent, a sleeping bag, a backpack, a suitcase, a wallet, a handbag, an umbrella, a winter jacket,
a raincoat, a dress, a shirt, a sweater, a pair of jeans, a pair of socks, a pair of gloves, a hat, a scarf,
a belt, a pair of running shoes, a pair of boots, a pair of sandals, a pair of glasses, a ring, a necklace,
a perfume, a soap, a shampoo, a toothbrush, a hair dryer, a razor, a sun cream, a garden chair, a lawn
mower, a hammer, a drill, a ladder, a paint, a guitar, a piano, a violin, a drum kit, a pen, a notebook, a
calendar, a car, a used car, a motorbike, a car wash, a set of tires, a novel, a mystery book, a history
book, a cookbook, a children's book, a travel guide, a poetry book, a comic book, a magazine, a newspaper, a
podcast, a music album, a movie, an action movie, a comedy film, a horror film, a romance movie, a
documentary, a cartoon, a TV series, a concert, a theatre play, a musical, a circus, a magic show, a
festival, a museum, an art gallery, a zoo, an aquarium, a theme park, a water park, a city tour, a boat
trip, a train trip, a bus ride, a taxi ride, a flight, an airline, an airport, a cruise, a hotel, a hostel,
a guest house, a campsite, a beach resort, a ski resort, a holiday, a swimming pool, a spa, a gym, a dance
class, a yoga class, a cooking class, a language course, a driving school, a restaurant, a pizza place, a
sushi bar, a burger bar, a bakery, a coffee shop, a tea house, a pub, an ice cream shop, a food truck, a
breakfast buffet, a sandwich, a soup, a pizza, a burger, a salad, a curry, a cake, a chocolate bar, a
cheese, a bread, a wine, a beer, a juice, a tea, a supermarket, a bookshop, a toy shop, a shoe shop, a
flower shop, a pet shop, a market, an online shop, a hair salon, a barber, a dentist, a doctor, a hospital,
a vet, a pharmacy, a bank, an insurance company, a post office, a delivery service, a moving company, a
cleaning service, a plumber, an electrician, a garage, a library, a school, a kindergarten, a cinema, a
bowling alley, a mobile app, a website, a weather app, a dating app, a dog food, a cat toy
"""
THINGS = tuple(thing.strip() for thing in THINGS.replace("\n", " ").split(","))

LENGTHS = (
    "one sentence",
    "two short sentences",
    "about ten words",
    "about twenty words",
    "one or two sentences",
)

# Written by hand. Shown as earlier turns of the chat, two or three of the asked mood at a time.
EXAMPLES = {
    "very positive": (
        ("a rain jacket", "two short sentences", "I love this jacket. It kept me warm and dry all winter!"),
        (
            "a diner",
            "one sentence",
            "The best pancakes in town, and the waitress was so friendly that we came back twice.",
        ),
        (
            "a thriller",
            "about twenty words",
            "I could not stop reading. Great story, great ending, and a hero I will never forget.",
        ),
        ("a night bus", "about ten words", "Clean, quiet and perfectly on time. I slept like a baby!"),
        (
            "a garden hose",
            "one or two sentences",
            "This hose is fantastic. My daughter uses it every day and it still looks new.",
        ),
    ),
    "positive": (
        ("a sushi knife", "one sentence", "It cuts well, feels good in the hand, and was worth the price."),
        (
            "a small inn",
            "two short sentences",
            "The room was small but very clean. Breakfast was fresh and the owner was kind.",
        ),
        ("a radio play", "about ten words", "A nice little story with good voices and calm music."),
        (
            "a pair of slippers",
            "one or two sentences",
            "Soft and warm. I wear them every evening, and they wash well too.",
        ),
        (
            "a tailor",
            "about twenty words",
            "He fixed my coat in two days for a fair price, and the work looks very neat.",
        ),
    ),
    "neutral": (
        (
            "a bus station",
            "one sentence",
            "It has seats, a small shop and a clock, and the buses come every hour.",
        ),
        ("a stapler", "about ten words", "It staples paper. It is blue and fits in a drawer."),
        (
            "a quiz show",
            "two short sentences",
            "Four people answer questions for an hour. I watched it once with my brother.",
        ),
        (
            "a canteen",
            "one or two sentences",
            "The food is the same as last year. We sat near the window and left at noon.",
        ),
        (
            "a bookend",
            "about twenty words",
            "It came in a plain box after four days, and it stands on the shelf next to my books.",
        ),
    ),
    "mixed": (
        (
            "a speedboat tour",
            "two short sentences",
            "The view was lovely. The boat was late and far too full.",
        ),
        ("a juicer", "one sentence", "It makes good juice, but it is loud and takes forever to clean."),
        (
            "a ghost story",
            "about twenty words",
            "The first half was slow and dull, but the end was clever and scared me quite a bit.",
        ),
        ("a noodle bar", "about ten words", "Tasty noodles and nice staff, but the prices are too high."),
        (
            "a travel mug",
            "one or two sentences",
            "It keeps tea hot for hours. Sadly the lid leaks in my bag.",
        ),
    ),
    "negative": (
        (
            "a bus tour",
            "two short sentences",
            "The guide was hard to hear. We waited an hour and saw very little.",
        ),
        ("a desk lamp", "one sentence", "The light is weak and the switch stopped working after a week."),
        ("a spy film", "about ten words", "Too long, too loud, and I guessed the ending early."),
        (
            "a coat",
            "one or two sentences",
            "It looked fine online, but the zip is cheap and it feels thin. I sent it back.",
        ),
        (
            "a lunch place",
            "about twenty words",
            "My soup was cold, the table was dirty, and nobody came when we asked for the bill.",
        ),
    ),
    "very negative": (
        (
            "a motel",
            "two short sentences",
            "The worst night of my life. The bed was dirty and the staff were rude!",
        ),
        (
            "a mixer",
            "one sentence",
            "It broke on the first day and the company refused to give me my money back.",
        ),
        ("a talent show", "about ten words", "Boring, stupid and painful to watch. I want my evening back."),
        (
            "a fish shop",
            "one or two sentences",
            "The fish smelled terrible and made my son sick. Never again!",
        ),
        (
            "a pair of trousers",
            "about twenty words",
            "Awful quality. They ripped at the knee in an hour, and the shop was rude when I called.",
        ),
    ),
}
MOODS = tuple(EXAMPLES)

# What else the request says, so that the mood is not only one word of it.
HINTS = {
    "very positive": "full of praise",
    "positive": "with something good about it",
    "neutral": "with plain facts and no feelings",
    "mixed": "with one good point and one bad point",
    "negative": "with something bad about it",
    "very negative": "full of complaints",
}
