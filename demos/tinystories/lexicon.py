"""The words of the story grammar: lists ordered from common to rare.

A draw from a list is weighted by rank (see `grammar.draw`), because the words of real stories are: one name in
five is Lily. Each list is one string; `/` parts its entries, so that entries may hold spaces.
"""

from __future__ import annotations


def entries(text: str) -> tuple[str, ...]:
    """Split a `/`-separated list and drop the line breaks inside it."""
    return tuple(" ".join(entry.split()) for entry in text.split("/") if entry.strip())


GIRLS = entries(
    """Lily/Mia/Sue/Sara/Anna/Lucy/Sally/Jane/Molly/Amy/Lila/Sarah/Jill/Emma/Mary/Jenny/Ella/Jen/Bella/Lisa/Sandy/
    Rachel/Tilly/Ann/Lola/Sophie/Susie/Kate/Poppy/Zara/Rosie/Emily/Betty/Lena/Claire/Tina/Julie/Daisy/Alice/Maggie/
    Nora/Ruby/Grace/Hannah/Ivy/Clara/Penny/Cindy/Abby/Maria"""
)
BOYS = entries(
    """Tim/Tom/Ben/Max/Sam/Timmy/Bob/Jack/John/Joe/Tommy/Leo/Billy/Jimmy/Andy/Jake/Jim/Peter/Benny/Pete/Gary/Fred/
    Bobby/Toby/Charlie/Frank/Jerry/James/Alex/Paul/Freddy/Oliver/Ted/Henry/George/Tony/Dan/Thomas/Harry/Daniel/Josh/
    Mark/Adam/Luke/Will/Danny/Johnny/Noah/Finn/Oscar"""
)
PET_NAMES = entries(
    """Max/Spot/Buddy/Fluffy/Whiskers/Momo/Bobo/Benny/Fin/Coco/Lulu/Rex/Snowy/Mittens/Binky/Luna/Ollie/Polly/Remy/
    Chirpy/Rover/Ziggy/Mimi/Toby/Pinky/Pip/Brownie/Sunny/Teddy/Biscuit/Ruby/Daisy/Ducky/Zippy"""
)
ANIMALS = entries(
    """dog/cat/bird/bear/rabbit/mouse/frog/squirrel/bunny/fish/duck/puppy/lion/monkey/elephant/fox/owl/pig/bee/
    butterfly/kitten/turtle/cow/horse/sheep/goat/deer/ant/snake/hen/crab/tiger/whale/giraffe/dolphin/zebra/penguin/
    snail/worm/bug/dinosaur/dragon/spider/rat/chicken/pony/hippo/parrot/beaver/raccoon"""
)
HELPERS = entries(
    """wise old owl/kind old man/big brown bear/little bird/friendly dog/tall man/old lady/nice lady/gray squirrel/
    little mouse/police officer/farmer/big strong man/green frog/friendly cat/clever fox/white rabbit/kind lady/
    old turtle/fairy/teacher/fireman/doctor/neighbor/boy with a red hat/girl with a blue dress/mailman"""
)
PLACES = entries(
    """park/garden/forest/beach/yard/woods/farm/zoo/playground/lake/pond/field/river/store/town/hill/backyard/school/
    meadow/market/village/library/mountain/sea"""
)
HOMES = entries(
    """small house/big house/small town/little village/big forest/big castle/small village/green forest/quiet town/
    farm/big city/cozy house/little house near the woods/house by the sea/big tree/little nest/warm cave/green meadow"""
)
ROOMS = entries("kitchen/room/bedroom/living room/garden/yard/garage/attic/bathroom/hall/closet/basement")
SPOTS = entries(
    """under the bed/behind the couch/under a tree/in the grass/behind a big rock/in the mud/near the pond/on the swing/
    under the table/in the toy box/on a bench/behind the door/in a bush/in the sand/by the fence/on the roof/
    inside a big box/near the slide/under some leaves/at the top of a tree/in a hole/next to the river/under a chair/
    behind the curtain/in the closet"""
)
TOYS = entries(
    """ball/doll/car/teddy bear/truck/toy car/kite/red ball/book/boat/train/balloon/toy/toy boat/toy truck/puzzle/
    blue ball/drum/robot/bike/toy train/toy plane/rocket/top/whistle/puppet/wagon/flute/toy dinosaur/stuffed bunny/
    marble/scooter/trumpet/jump rope/toy horse"""
)
THINGS = entries(
    """box/stick/rock/hat/shiny rock/key/book/leaf/flower/coin/bag/big box/map/button/bell/shell/feather/mirror/bucket/
    ring/red balloon/star/stone/bottle/pot/jar/rope/pen/crayon/hammer/lamp/basket/wheel/flag/umbrella/blanket/mask/
    notebook/pencil/ribbon/cup/magnet/crown/wand/letter/picture/gem/penny/brush/ladder/spoon/helmet/candle/clock/
    microphone/camera/net/broom/shovel/pillow"""
)
FOODS = entries(
    """cake/apple/cookie/ice cream/soup/bread/cheese/pie/pizza/banana/honey/jam/fruit/fish/carrot/egg/corn/rice/
    sandwich/orange/pear/candy/chocolate/cherry pie/pancake/berry pie/pasta/butter/cereal/potato/chicken/salad/nut/
    strawberry/peach/muffin/lemon cake/pudding/turkey/bean soup/popcorn/meat/cupcake/tomato/grape/watermelon"""
)
# How each food stands after "some": a count noun takes its plural, a mass noun stays.
MASS_FOODS = frozenset(
    entries(
        """ice cream/soup/bread/cheese/pizza/honey/jam/fruit/fish/corn/rice/candy/chocolate/pasta/butter/cereal/
        chicken/salad/pudding/turkey/bean soup/popcorn/meat/watermelon/cake/pie/cherry pie/berry pie/lemon cake"""
    )
)
DRINKS = entries("water/milk/juice/lemonade/cold water/apple juice/orange juice/cold milk/tea")
MEALS = entries("lunch/dinner/breakfast/a snack/supper")
COLORS = entries("red/blue/green/yellow/pink/white/brown/black/purple/orange/gray/gold")
SIZES = entries("big/little/small/tiny/huge/tall/long/giant")
LOOKS = entries(
    """pretty/shiny/nice/old/new/beautiful/soft/special/funny/round/colorful/magic/strange/heavy/bright/broken/smooth/
    lovely/wet/dirty/clean/sharp/dusty/fancy/cute/rough/thin/wooden/warm/furry/loud/fuzzy/golden/plain/rare/ugly"""
)
TRAITS = entries(
    """happy/kind/brave/curious/nice/good/silly/clever/smart/friendly/gentle/playful/helpful/polite/careful/cheerful/
    quiet/strong/shy/funny/lively/honest/patient/energetic/sweet/adventurous/loyal/generous/thoughtful/creative"""
)
FLAWS = entries(
    """selfish/naughty/greedy/mean/bossy/lazy/grumpy/careless/jealous/stubborn/rude/impatient/noisy/messy/proud/
    clumsy/forgetful"""
)
WEATHERS = entries("sunny/rainy/windy/hot/cold/snowy/cloudy/warm/nice/beautiful/bright")
ADULTS = entries("mom/dad/grandma/mommy/daddy/grandpa/mum/mother")
CLOTHES = entries("coat/hat/scarf/jacket/sweater/boots/dress/shirt/mittens/shoes/gloves/cape/socks")
NATURE = entries(
    """trees/flowers/birds/clouds/leaves/ducks/butterflies/stars/rocks/bees/bugs/animals/fish/sticks/shells/rabbits/
    squirrels/frogs/ants/worms"""
)
GAMES = entries(
    """hide and seek/tag/catch/with the ball/in the sand/with blocks/pretend/on the slide/on the swings/with dolls/
    with cars/games/in the mud/dress up/with toys/in the water/in the leaves/outside/in the sun/with puppets/soccer"""
)
SOUNDS = entries("loud noise/soft sound/strange noise/funny sound/big bang/loud crash/tiny voice/small cry/roar")
