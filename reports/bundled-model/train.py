"""Makes the small bundled language model from text that a larger model writes.

Steps: sample documents from SmolLM2-135M-Instruct, train a byte-level BPE tokenizer on them, train a
4.2M-parameter Llama on the packed tokens, save it in bf16, reload it and measure it.

    python train.py --teacher SMOLLM2_DIR --out OUT

writes OUT/tiny (model, tokenizer, card), OUT/text (calibration.txt, heldout.txt), OUT/train.log and
OUT/documents.jsonl (everything that was sampled and kept).
One GPU is expected. ``--device cpu`` with small ``--batch``, ``--round`` and ``--rounds`` is a dry run.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

EOT = "<|endoftext|>"
WINDOW = 512
VOCAB = 4096
PROMPT_TOKENS = 96  # longest prompt, in the teacher's tokens
DOCUMENT_TOKENS = 512  # longest document, in the teacher's tokens
QUEUE = 10  # prompts that wait at each place of the batch
BLOCK = 64  # the cache grows by this many positions
FORCED, END = -1, -2  # marks in the decode log: a prompt token, an end token

# ------------------------------------------------------------------------------------------- prompts

NAMES = """Anna Ben Clara Daniel Elena Felix Grace Hugo Iris Jonas Kira Leo Maya Noah Olivia Peter Quinn
Rosa Samuel Tara Umar Vera Walter Xenia Yusuf Zoe Amir Beatrice Carlos Diana Emil Fatima George Hana
Ivan Julia Kofi Lucia Marco Nadia Oscar Priya Ravi Sofia Tomas Ursula Victor Wendy Yara Zane Alice Boris
Chen Dora Eli Freya Gustav Helen Isaac Joan Karim Lena Milo Nina Otto Paula Rafael Sara Theo Una Violet
Wei Adele Bruno Cora Dmitri Esther Frank Greta Henry Ingrid Jasper Kate Liam Martha Nils Opal Pablo Ruth
Stefan Tilda"""

PLACES = """a small fishing village|a quiet mountain town|a busy harbour|an old library|a desert
oasis|a farm in a valley|a large city|a snowy forest|a lighthouse|a school|a railway station|a
market square|a space station|a castle|an island|a hospital|a bakery|a theatre|a river boat|a
museum|a hidden garden|a coal mine|a research station|a village by a lake|an apartment block|a
monastery|a circus|a ship at sea|a train at night|a border town|a jungle camp|a workshop|a
university|a kitchen|a vineyard|a flooded street|an airport|a windmill|a toy shop|a courtroom"""

NOUNS = """lantern key bridge map dog horse letter boat violin stone garden clock window river coat
apple bicycle mirror candle basket feather ladder ring wolf owl fox kite bell drum book piano hammer
rope blanket bottle shell ship tower wheel cup hat needle ticket coin camera radio snow storm rainbow
shadow whistle puppet crown engine cake fish spider bear mouse cat rabbit turtle dragon robot painting
statue telescope compass anchor tent tunnel well orchard seed oak glove scarf chair door roof fence road
market train carriage island cave lake cloud star moon sun spoon lamp pillow box chain flute sword
shield pencil"""

VERBS = """repair find lose carry hide build paint follow break borrow steal plant trade open close
climb guard chase mend send read write forget remember cook share wash measure weigh count throw catch
push lift fold cross visit rescue free teach learn watch call answer sell buy dig burn light cut draw
sing dance wait save return promise refuse"""

ADJECTIVES = """old brave shy clever broken golden quiet lonely tiny strange heavy bright tired honest
hungry wooden frozen gentle angry lost empty dusty silver careless patient proud curious forgotten warm
sharp crooked kind stubborn sleepy famous poor rich wild calm nervous"""

STYLES = """simple|formal|warm|funny|serious|dry|lively|poetic|plain|dramatic|thoughtful|
friendly|suspenseful|hopeful|sad|ironic|concise|detailed|old-fashioned|modern"""

READERS = """a child|a beginner|a student|a busy reader|a curious adult|a teacher|a new neighbour|
a ten-year-old|an expert|a grandmother|a team at work|a visitor from abroad"""

GENRES = """fairy tale|mystery|adventure story|love story|ghost story|science fiction story|fable|
comedy|short story|bedtime story|historical story|detective story|sea story|animal story|school
story|war story|family story|travel story|story about a friendship|story with a surprising end"""

SCIENCE = """photosynthesis|gravity|magnetism|the water cycle|volcanoes|earthquakes|black holes|
the solar system|evolution|DNA|the human heart|the immune system|vaccines|bacteria|viruses|the
brain|sleep|memory|light and colour|sound waves|electricity|batteries|atoms|chemical bonds|
acids and bases|the periodic table|steam engines|aeroplanes and lift|radio waves|lasers|nuclear
energy|solar panels|wind turbines|glaciers|ocean currents|tides|coral reefs|whales|bees and
pollination|ants|migration of birds|dinosaurs|fossils|rust|combustion|evaporation|clouds and
rain|lightning|tornadoes|the seasons|the phases of the moon|comets|stars|galaxies|the ozone
layer|the greenhouse effect|soil|fungi|seeds and germination|digestion|the lungs|the kidneys|
bones and muscles|the eye|the ear|taste and smell|genetics of peas|ecosystems|food chains|rain
forests|deserts|the Arctic|penguins|octopuses|sharks|spiders|bats|frogs and metamorphosis|
crystals|diamonds|friction|momentum|pressure|heat transfer|thermometers|lenses and telescopes|
microscopes|probability|prime numbers|fractions|triangles|circles and pi|averages|algorithms|
binary numbers|encryption|computer memory|the internet|search engines|neural networks|robots|
satellites|maps and coordinates"""

HISTORY = """ancient Egypt|the Roman roads|the Silk Road|the printing press|the fall of
Constantinople|the Black Death|the Vikings|the Industrial Revolution|the French Revolution|the
invention of the wheel|ancient Greece and democracy|the building of cathedrals|the Renaissance|the
age of sail|the spice trade|the discovery of penicillin|the history of writing|the history of bread|
the history of the bicycle|the history of the railway|the history of chess|the history of the
calendar|the history of coffee|the history of tea|the history of paper|the history of glass|the
history of money|the history of the telephone|the history of photography|the history of football|the
Great Wall of China|the Inca roads|the Maya calendar|the Ottoman Empire|the Mongol Empire|feudal
Japan|the gold rush|the first flight|the race to the Moon|the suffrage movement|the end of slavery|
the First World War|the Second World War|the Cold War|the Berlin Wall|the Aztecs|the Phoenicians|
ancient Babylon|the library of Alexandria|castles and sieges|medieval guilds|the Hanseatic League|
polar exploration|the Panama Canal|the Suez Canal|the opera|the novel|public schools|hospitals and
nursing|the post"""

DAILY = """a bicycle tyre|a leaking tap|a squeaky door|a garden bed|tomato plants|a compost heap|a
bird house|a bookshelf|a paper kite|a campfire|a tent|a weekly budget|a study plan|a job
interview|a birthday party|a speech|a small business|a blog|a CV|a thank-you note|a morning
routine|a home library|a first-aid kit|a vegetable garden|a sourdough starter|a knitted scarf|a
wooden table|a fish tank|a puppy|a cat|a houseplant|a picnic|a long walk|a road trip|a train
journey|a move to a new flat|a noisy neighbour|a difficult talk|a negotiation|a meeting|an email
inbox|a messy desk|a slow computer|a lost password|a stained shirt|a woollen jumper|a rusty pan|a
frozen pipe|a power cut|a snowed-in car"""

DISHES = """tomato soup|lentil soup|pancakes|banana bread|apple pie|vegetable curry|fried rice|
mushroom risotto|roast chicken|fish stew|bean chilli|potato salad|pumpkin soup|onion tart|spinach
omelette|oat biscuits|chocolate cake|lemon cake|rice pudding|flat bread|pizza dough|pasta with
garlic|stuffed peppers|chickpea salad|noodle soup|beef stew|baked salmon|cabbage rolls|carrot
cake|cheese scones|corn bread|fruit salad|ginger tea|hot chocolate|tomato sauce|pesto|hummus|
vegetable lasagne|dumplings|waffles"""

THEMES = """honesty|courage|patience|friendship|the sea|winter|spring|autumn leaves|a lost dog|
an old house|the night sky|rain|a long journey|home|growing old|childhood|music|bread|silence|
a river|mountains|the city at night|hope|work|learning a language|time|dreams|forgiveness|a
garden|birds|a letter never sent|fear|kindness|sharing|failure|luck|money and happiness|sport|
reading|teachers|technology|travel|family|food|health|sleep|exercise|public transport|cities
and trees|clean water|recycling|art|theatre|museums|farming|fishing|animals in the zoo|social
media|privacy|school uniforms|homework|remote work|space travel|robots at home"""

EVENTS = """a new bridge opens|a storm damages the harbour|a school wins a science prize|a lost
painting is found|the library gets longer hours|a rare bird is seen|a factory closes|a bakery wins
an award|a river floods the old town|volunteers clean a beach|a local team wins the cup|a power cut
stops the trams|a museum shows old maps|a new park is planned|a doctor retires after forty years|a
farm grows a giant pumpkin|a train line is repaired|a theatre reopens|students build a solar car|a
fire is put out in time|the market moves to a new square|an old ship is restored|a village gets fast
internet|a comet can be seen tonight|a dog saves a child"""

JOBS = """a baker|a nurse|a sailor|a teacher|a carpenter|a pilot|a farmer|a doctor|a detective|
a librarian|a gardener|a cook|a painter|a postman|an engineer|a shopkeeper|a student|a soldier|
a musician|a lawyer|a shepherd|a clockmaker|a scientist|a bus driver|a fisherman|an astronaut|a
king|a thief|an actor|a reporter"""

FEELINGS = """late|in love|homesick|excited|jealous|grateful|worried|bored|proud|sorry|
confused|very tired|cheerful|in a hurry|afraid of the dark|full of plans"""

CODE = """adds two numbers|finds the largest number in a list|counts the words in a text|reverses a
string|checks whether a number is prime|sorts a list of names|computes a factorial|reads a file line
by line|converts Celsius to Fahrenheit|removes duplicates from a list|finds the average|prints a
multiplication table|checks a password|counts vowels|merges two dictionaries|draws a triangle of
stars|computes Fibonacci numbers|searches a sorted list|groups words by first letter|rolls two dice|
keeps a shopping list|computes compound interest|checks for palindromes|splits a bill|finds common
items of two lists|turns a date into text"""

QUESTIONS = """Why is the sky blue?|Why do leaves change colour?|How do bees make honey?|Why do we
yawn?|What makes a good friend?|How does a bank earn money?|Why is sleep important?|What is the
difference between weather and climate?|How do ships float?|What is inflation?|Why do cats purr?|How
is cheese made?|What do historians do?|How do I save money each month?|What should I see in a new
city?|How can I read more books?|Why do people dance?|What is a good breakfast?|How do I learn to
swim?|How do elections work?|What is a fair price?|How are roads built?|Why do we have leap years?|
How do I stop being nervous?|What makes music sad?|How does a fridge work?|Why is the sea salty?|How
do plants drink?|What is democracy?|How do I apologise?|How are books printed?|Why do languages
change?|What is a black hole?|How do I train for a long run?|What is the best way to study?"""

OPENINGS = """The history of {history0} begins|In the early days of {history0},|Once upon a time, in
{place},|{name} had never seen|The first thing {name} noticed was|It was a cold morning in {place}
and|One of the most important facts about {science} is|Scientists who study {science} have|When
people talk about {science},|The study of {science} is|In this chapter we will look at {science}.|In
this lesson, you will learn about {science}.|"I don't think so," said {name}.|{name} and {name2} lived
in {place}.|Every summer {name} went to {place}.|To make {dish}, you need|{dish_cap} is a dish that|
Many people believe that {theme}|There are several reasons why {theme}|The report says that|Last
week,|The {adjective} {noun} stood|Nobody in {place} knew why|Dear {name},|Chapter 1|My name is
{name} and I am {job}.|The town council met on Monday because|A {noun} is|How to care for {daily}:|
The main difference between a {noun} and a {noun2} is|According to a new study,|The old {noun}
belonged to|As {job}, {name} knew|During the war,|The best way to {verb} a {noun} is|In {place}
there was {job} who|The weather today|In mathematics,|In biology,|In chemistry,|In physics,|In
literature,|In economics,|In music,|The river|The government|The company|Most animals|Most
children|Trees|Our planet|Water|Every language|The artist|A good teacher|Before the invention of
the {noun},|{name} opened the door and"""

TASKS = """
6 Write a {style} {genre} about {name}, {job}, set in {place}.
6 Write a {genre} that uses the words "{verb}", "{noun}" and "{adjective}".
5 Tell a {style} {genre} about a {adjective} {noun} and {job} called {name}.
4 Write a {genre} in which {name} and {name2} must {verb} a {adjective} {noun}.
3 Continue this story: "{name} stood in {place} and held a {adjective} {noun}."
3 Write a story for {reader} about {theme}. The main character is {name}.
3 Write the first chapter of a {genre} that begins in {place}.
5 Explain {science} to {reader}.
4 Write a {style} article about {science}.
3 Describe how {science} matters in daily life.
3 Write three paragraphs about {science} for a school book.
3 What are common mistakes people make about {science}?
4 Write a short essay on {history}.
3 Explain {history} to {reader}.
3 Why was {history} important? Give causes and effects.
2 Imagine you are {job} who lives through {history}. Write a diary page.
4 Write a letter from {name} to {name2} about {theme}.
3 Write a {style} letter in which {name}, {job}, asks {name2} for a {noun}.
2 Write a formal email to a colleague named {name} about {daily}.
2 Write a complaint about a {adjective} {noun} that was delivered to {place}.
5 Write a dialogue between {name}, {job}, and {name2}, {job2}, about {theme}.
3 Write a conversation in {place}: {name} is {feeling}, {name2} wants to {verb} a {noun}.
2 Write an interview with {job} from {place} about {theme}.
2 Write a short scene of a play with {name} and {name2} in {place}.
3 List ten facts about {science}.
2 List seven tips for {reader} about {daily}.
2 Give five reasons for and five reasons against {theme}.
4 Write a recipe for {dish} with ingredients and steps.
2 Tell {reader} how to cook {dish} in {place}.
2 Write about the history and taste of {dish}.
4 Give step-by-step instructions for {daily}.
3 How do I deal with {daily}? Answer in a {style} way.
4 Write a {style} news report: {event}.
2 Write a newspaper article about {place} where {event}.
4 Write a poem about {theme}.
2 Write a {style} poem with rhymes about a {adjective} {noun}.
2 Write song lyrics about {theme} for {reader}.
4 Write a diary entry of {name}, {job}, who is {feeling}.
3 Write a {style} essay about {theme}.
2 Write a speech by {name}, {job}, about {theme}.
2 Describe {place} in a {style} way. Use all five senses.
2 Describe a {adjective} {noun} so that {reader} can picture it.
2 Compare a {noun} and a {noun2}.
3 Write a Python function that {code} and explain it.
1 Explain to {reader} how a program that {code} works.
4 {question}
2 {question} Explain it to {reader}.
2 Write a review of a {genre} called "The {adjective_cap} {noun_cap}".
2 Write the biography of an invented person: {name}, {job} from {place}.
2 Write a travel guide for {place}.
2 Write a fable about a {noun} and a {noun2} with a moral about {theme}.
1 Write a word problem about a {noun} and a {noun2} and solve it.
1 Write an advertisement for a {adjective} {noun}.
1 Write a {style} product description of a {noun}.
1 Write the minutes of a meeting in {place} about {theme}.
1 Write a myth that explains where the {noun} comes from.
"""


def words(text: str) -> list[str]:
    """The entries of a list that is separated by bars and may be broken over lines."""
    return [entry.strip() for entry in " ".join(text.split()).split("|")]


class Prompts:
    """Draws prompts: (text for the teacher, text that opens the document)."""

    def __init__(self, seed: int, chat_template: str, free_share: float = 0.15) -> None:
        self.rng = random.Random(seed)
        self.before, self.after = chat_template.split("PROMPT")
        self.free_share = free_share
        lists = {
            "place": PLACES,
            "style": STYLES,
            "reader": READERS,
            "genre": GENRES,
            "science": SCIENCE,
            "history": HISTORY,
        }
        lists |= {
            "daily": DAILY,
            "dish": DISHES,
            "theme": THEMES,
            "event": EVENTS,
            "job": JOBS,
            "feeling": FEELINGS,
        }
        lists |= {"code": CODE, "question": QUESTIONS}
        self.lists = {key: words(text) for key, text in lists.items()}
        single = {"name": NAMES, "noun": NOUNS, "verb": VERBS, "adjective": ADJECTIVES}
        self.lists |= {key: text.split() for key, text in single.items()}
        lines = [line.split(" ", 1) for line in TASKS.strip().splitlines()]
        self.tasks = [task for _, task in lines]
        self.weights = [int(weight) for weight, _ in lines]
        self.openings = words(OPENINGS)

    def fill(self, template: str) -> str:
        pick = {key: self.rng.choice(values) for key, values in self.lists.items()}
        for key in ("name", "noun", "job"):
            pick[key + "2"] = self.rng.choice(self.lists[key])
        for key in ("noun", "adjective", "dish"):
            pick[key + "_cap"] = pick[key].capitalize()
        pick["history0"] = pick["history"].removeprefix("the history of ")
        return re.sub(r"\b([Aa]) (?=[aeio]|u(?!ni))", r"\1n ", template.format(**pick))

    def draw(self) -> tuple[str, str]:
        if self.rng.random() < self.free_share:
            opening = self.fill(self.rng.choice(self.openings))
            return EOT + opening, opening
        task = self.fill(self.rng.choices(self.tasks, self.weights)[0])
        return self.before + task + self.after, ""


# ---------------------------------------------------------------------------------------- the decoder


class Decoder:
    """The teacher's weights driven over a preallocated cache, one token of every sequence at a time.

    A place of the batch that ends its document takes the next prompt of its queue at the next step.
    Prompt tokens are fed like sampled ones. All places share the step counter; a document sees the
    cache from its own first position on, and the rotary embedding is relative, so both are exact.
    """

    def __init__(self, model: Any, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        self.batch, self.length, self.device, self.dtype = batch, length, device, dtype
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps

        def put(*weights: Tensor) -> Tensor:
            return torch.cat([w.detach() for w in weights]).to(device, dtype)

        self.embed = put(model.model.embed_tokens.weight)
        self.head = self.embed if config.tie_word_embeddings else put(model.lm_head.weight)
        self.norm = put(model.model.norm.weight)
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            self.layers.append(
                {
                    "ln1": put(layer.input_layernorm.weight),
                    "qkv": put(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight),
                    "o": put(a.o_proj.weight),
                    "ln2": put(layer.post_attention_layernorm.weight),
                    "up": put(m.gate_proj.weight, m.up_proj.weight),
                    "down": put(m.down_proj.weight),
                }
            )
        theta = config.rope_parameters["rope_theta"]
        angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, self.dim, 2) / self.dim)
        self.cos = torch.cat([angle.cos(), angle.cos()], 1).to(device, dtype)
        self.sin = torch.cat([-angle.sin(), angle.sin()], 1).to(device, dtype)
        shape = (len(self.layers), 2, batch, self.kv, length, self.dim)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.index = torch.arange(length, device=device)
        zeros = torch.zeros(batch, device=device, dtype=torch.long)
        self.token, self.queue, self.offset, self.start = (zeros.clone() for _ in range(4))
        self.step = torch.zeros(1, device=device, dtype=torch.long)
        self.prompts = torch.zeros(batch, QUEUE, PROMPT_TOKENS, device=device, dtype=torch.long)
        self.sizes = torch.ones(batch, QUEUE, device=device, dtype=torch.long)
        self.rows = torch.arange(batch, device=device)
        self.log = torch.zeros(length, batch, device=device, dtype=torch.int32)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def logits(self, length: int) -> Tensor:
        """Logits after the current tokens, which enter the cache at the current step."""
        t, kv, dim = self.step, self.kv, self.dim
        cos, sin = self.cos.index_select(0, t), self.sin.index_select(0, t)
        index = self.index[:length]
        seen = (index >= self.start[:, None]) & (index <= t)
        bias = torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, -math.inf)[:, None, None, :]
        x = F.embedding(self.token, self.embed)
        for i, w in enumerate(self.layers):
            h = F.rms_norm(x, x.shape[-1:], w["ln1"], self.eps)
            qkv = F.linear(h, w["qkv"]).view(self.batch, -1, dim)
            qk = qkv[:, : self.heads + kv]
            qk = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin)
            keys, values = self.cache[i, 0], self.cache[i, 1]
            keys.index_copy_(2, t, qk[:, self.heads :, None])
            values.index_copy_(2, t, qkv[:, self.heads + kv :, None])
            # the query heads that share a key head stand where several positions of one head would
            q = qk[:, : self.heads].reshape(self.batch, kv, self.heads // kv, dim)
            a = F.scaled_dot_product_attention(q, keys[:, :, :length], values[:, :, :length], bias)
            x = x + F.linear(a.reshape(self.batch, -1), w["o"])
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], w["ln2"], self.eps), w["up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w["down"])
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.eps), self.head)

    def advance(self, length: int, specials: int, temperature: float, top_k: int, min_p: float) -> None:
        """One step: sample, or take the next prompt token, and note what happened in the log."""
        top, which = self.logits(length).topk(top_k, sorted=False)
        p = torch.softmax(top.float() / temperature, -1)
        p = torch.where(p < min_p * p.amax(-1, keepdim=True), 0.0, p)
        choice = (p / torch.empty_like(p).exponential_().clamp_min_(1e-10)).argmax(-1, keepdim=True)
        sampled = which.gather(1, choice)[:, 0]
        offset = self.offset + 1
        size = self.sizes[self.rows, self.queue]
        written = offset >= size
        ended = sampled < specials
        self.log.index_copy_(0, self.step, self.note(written, ended, sampled)[None])
        done = written & (ended | (offset - size + 1 >= DOCUMENT_TOKENS))
        queue = (self.queue + done) % QUEUE
        offset = torch.where(done, 0, offset)
        forced = self.prompts[self.rows, queue, offset.clamp_max(PROMPT_TOKENS - 1)]
        self.token.copy_(torch.where(written & ~done, sampled, forced))
        self.start.copy_(torch.where(done, self.step + 1, self.start))
        self.queue.copy_(queue)
        self.offset.copy_(offset)
        self.step.add_(1)

    @staticmethod
    def note(written: Tensor, ended: Tensor, sampled: Tensor) -> Tensor:
        return torch.where(written, torch.where(ended, END, sampled), FORCED).int()

    def load(self, prompts: np.ndarray, sizes: np.ndarray) -> None:
        """Puts new queues in place and goes back to step 0."""
        self.prompts.copy_(torch.from_numpy(prompts))
        self.sizes.copy_(torch.from_numpy(sizes))
        for state in (self.queue, self.offset, self.start, self.step):
            state.zero_()
        self.token.copy_(self.prompts[:, 0, 0])

    def capture(self, *sampling: Any) -> None:
        """One CUDA graph for each length of the cache in use."""
        for length in range(BLOCK, self.length + 1, BLOCK):
            self.step.fill_(length - 2)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.advance(length, *sampling)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            pool = self.graphs[BLOCK].pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self.advance(length, *sampling)
            self.graphs[length] = graph

    def run(self, *sampling: Any) -> None:
        """All steps of a round; returns before the GPU is done."""
        for t in range(self.length):
            length = (t // BLOCK + 1) * BLOCK
            if self.graphs:
                self.graphs[length].replay()
            else:
                self.advance(length, *sampling)


def check_decoder(model: Any, encode: Any, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compares the decoder with the library's own forward pass: fp32 tightly, ``dtype`` loosely."""
    texts = ["The tide came in slowly while the children counted boats.", "Bread is made from flour,"]
    ids = [encode(text)[:9] for text in texts]
    reference = []
    with torch.no_grad():
        exact = model.float().to(device)
        for row in ids:
            reference.append(exact(torch.tensor([row], device=device)).logits[0])
    errors = {}
    for name, kind in (("fp32", torch.float32), ("used", dtype)):
        decoder = Decoder(exact, 2, BLOCK, device, kind)
        worst = 0.0
        # place 0 holds text 0 from position 0; place 1 holds text 1 from position 3, after other tokens
        shift = 3
        for t in range(9 + shift):
            decoder.token[0] = ids[0][min(t, len(ids[0]) - 1)]
            decoder.token[1] = ids[1][min(max(t - shift, 0), len(ids[1]) - 1)] if t >= shift else 7 + t
            decoder.start[1] = shift if t >= shift else 0
            out = decoder.logits(BLOCK).float()
            decoder.step.add_(1)
            for place, position in ((0, t), (1, t - shift)):
                if 0 <= position < len(ids[place]):
                    want = reference[place][position]
                    worst = max(worst, ((out[place] - want).norm() / want.norm()).item())
        errors[name] = worst
        del decoder
    model.to(dtype)
    if errors["fp32"] > 1e-3 or errors["used"] > 0.08:
        raise SystemExit(f"the decoder disagrees with the library: {errors}")
    return errors


# ------------------------------------------------------------------------------------------ documents

WORKER: dict[str, Any] = {}
PREFACE = re.compile(r"^(sure|certainly|of course|here is|here's|here are|i'd be|okay|great)\b.*(:|!)$", re.I)
SENTENCE_END = re.compile(r"(?<=[^\d\s.])[.!?][\"')\]]*(?=\s|$)")
BANNED = re.compile(
    r"smollm|hugging ?face|openai|chatgpt|language model|as an ai\b|ai assistant|https?:|www\.|@|\ufffd"
    r"|suicid|\brape|porn|nazi|\bsex(y|ual)?\b",
    re.I,
)


def start_worker(tokenizer: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    WORKER["tokenizer"] = Tokenizer.from_file(tokenizer)


def clean(text: str, cut: bool) -> str | None:
    """The document as it is kept, or None. Blank lines go: they separate documents."""
    if BANNED.search(text):
        return None
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line]
    if lines and PREFACE.match(lines[0]):
        lines = lines[1:]
    text = "\n".join(lines).strip()
    # the teacher falls into loops: the document ends before its first repeated run of seven words
    tokens = list(re.finditer(r"\S+", text))
    seen: set[tuple[str, ...]] = set()
    for i in range(len(tokens) - 6):
        run = tuple(token[0] for token in tokens[i : i + 7])
        if run in seen:
            text, cut = text[: tokens[i].start()].rstrip(), True
            break
        seen.add(run)
    if cut:
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    split = text.split()
    if len(split) < 40 or sum(ord(c) > 127 for c in text) > 0.03 * len(text):
        return None
    if len(set(zip(split, split[1:], split[2:], strict=False))) < 0.8 * (len(split) - 2):
        return None
    return text


def documents(job: tuple[np.ndarray, list[list[str]]]) -> tuple[list[str], int]:
    """Cuts the log of some places into documents; also says how many there were before the filters."""
    log, openings = job
    kept, seen = [], 0
    for place, opens in enumerate(openings):
        column = log[:, place]
        column = column[column != FORCED]
        pieces: list[tuple[list[int], bool]] = []
        current: list[int] = []
        for token in column.tolist():
            if token == END:
                pieces.append((current, False))
                current = []
                continue
            current.append(token)
            if len(current) == DOCUMENT_TOKENS:
                pieces.append((current, True))
                current = []
        pieces.append((current, True))
        for number, (ids, cut) in enumerate(pieces):
            if ids:
                seen += 1
                text = clean(opens[number % QUEUE] + WORKER["tokenizer"].decode(ids), cut)
                if text:
                    kept.append(text)
    return kept, seen


class Log:
    """Prints to the screen and to a file."""

    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("w")
        self.began = time.monotonic()

    def __call__(self, text: str) -> None:
        for out in (sys.stdout, self.file):
            print(text, file=out, flush=True)

    def stage(self, text: str) -> None:
        self(f"[{time.monotonic() - self.began:6.1f} s] {text}")


def generate(args: argparse.Namespace, device: torch.device, log: Log, pool: Any) -> tuple[list[str], dict[str, Any]]:
    """Documents that the teacher writes in the time given."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    chat = transformers.AutoTokenizer.from_pretrained(args.teacher)
    fast = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
    messages = [
        {"role": "system", "content": "You are a good writer."},
        {"role": "user", "content": "PROMPT"},
    ]
    template = chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    log(f"chat template: {template!r}")
    specials = 0
    while specials in fast.get_added_tokens_decoder():
        specials += 1
    prompts = Prompts(args.seed, template)
    for _ in range(12):
        log(f"a prompt: {prompts.draw()[0].replace(prompts.before, '').replace(prompts.after, '')!r}")

    def encode(text: str) -> list[int]:
        return fast.encode(text, add_special_tokens=False).ids

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        errors = check_decoder(teacher, encode, device, dtype)
        log.stage(f"decoder against the library, worst relative error: {errors}")
        decoder = Decoder(teacher, args.batch, args.round, device, dtype)
    del teacher

    def queues() -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
        drawn = [prompts.draw() for _ in range(args.batch * QUEUE)]
        rows = [e.ids for e in fast.encode_batch([text for text, _ in drawn], add_special_tokens=False)]
        ids = np.zeros((len(rows), PROMPT_TOKENS), dtype=np.int64)
        for i, row in enumerate(rows):
            if len(row) > PROMPT_TOKENS:
                raise SystemExit(f"a prompt of {len(row)} tokens: {drawn[i][0]!r}")
            ids[i, : len(row)] = row
        sizes = np.array([len(row) for row in rows]).reshape(args.batch, QUEUE)
        openings = [text for _, text in drawn]
        split = [openings[i : i + QUEUE] for i in range(0, len(openings), QUEUE)]
        return ids.reshape(args.batch, QUEUE, PROMPT_TOKENS), sizes, split

    sampling = (specials, args.temperature, args.top_k, args.min_p)
    torch.manual_seed(args.seed)
    results, tokens, rounds = [], 0, 0
    with torch.no_grad():
        if device.type == "cuda":
            decoder.capture(*sampling)
            memory = torch.cuda.memory_allocated() / 2**30
            log.stage(f"captured {len(decoder.graphs)} graphs, {memory:.1f} GiB in use")
        following = queues()
        begin = time.monotonic()
        longest = 0.0
        while rounds < args.rounds and time.monotonic() - begin + longest < args.minutes_generate * 60:
            at = time.monotonic()
            ids, sizes, openings = following
            decoder.load(ids, sizes)
            decoder.run(*sampling)
            following = queues()
            out = decoder.log.cpu().numpy().copy()
            written = int((out >= 0).sum())
            rounds, tokens = rounds + 1, tokens + written
            width = max(1, args.batch // 32)
            for i in range(0, args.batch, width):
                results.append(pool.apply_async(documents, ((out[:, i : i + width], openings[i : i + width]),)))
            took = time.monotonic() - at
            longest = max(longest, took)
            log.stage(f"round {rounds}: {written} tokens in {took:.2f} s, {written / took:.0f} tokens/s")
    seconds = time.monotonic() - begin
    texts, total = [], 0
    for result in results:
        kept, seen = result.get()
        texts += kept
        total += seen
    unique = list(dict.fromkeys(texts))
    figures = {
        "rounds": rounds,
        "teacher_tokens": tokens,
        "generate_seconds": round(seconds, 1),
        "teacher_tokens_per_second": round(tokens / seconds),
        "documents_written": total,
        "documents_kept": len(unique),
        "megabytes": round(sum(len(text.encode()) for text in unique) / 1e6, 2),
    }
    log.stage(f"documents: {json.dumps(figures)}")
    return unique, figures


def split(texts: list[str], seed: int) -> dict[str, list[str]]:
    """Splits by document. No document of a small part opens with the words of one of another part."""
    order = texts[:]
    random.Random(seed).shuffle(order)
    most = sum(len(text) for text in texts) // 20
    full = {"heldout": 200_000, "calibration": 300_000, "validation": 300_000}
    wanted = {name: min(size, most) for name, size in full.items()}
    opening = {text: " ".join(text.split()[:8]).lower() for text in order}
    count = Counter(opening.values())
    parts: dict[str, list[str]] = {name: [] for name in [*wanted, "train"]}
    sizes = dict.fromkeys(wanted, 0)
    for text in order:
        name = next((n for n in wanted if sizes[n] < wanted[n]), "train")
        if name != "train" and count[opening[text]] > 1:
            name = "train"
        parts[name].append(text)
        if name != "train":
            sizes[name] += len(text.encode()) + 2
    return parts


# ------------------------------------------------------------------------------- tokenizer and training


def make_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    """Byte-level BPE, saved so that AutoTokenizer reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def stream(tokenizer: Tokenizer, texts: list[str], seed: int) -> np.ndarray:
    """All documents in one row. Half of them end with a blank line, half with the end token."""
    rng = random.Random(seed)
    blank, end = tokenizer.encode("\n\n").ids, [tokenizer.token_to_id(EOT)]
    parts = []
    for i in range(0, len(texts), 4096):
        for encoding in tokenizer.encode_batch_fast(texts[i : i + 4096]):
            parts.append(np.array(encoding.ids + (blank if rng.random() < 0.5 else end), dtype=np.int16))
    return np.concatenate(parts)


def student(device: torch.device) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        use_cache=True,
    )
    return transformers.LlamaForCausalLM(config).to(device)


def train(
    args: argparse.Namespace, model: Any, data: np.ndarray, held: np.ndarray, device: torch.device, log: Log
) -> dict[str, Any]:
    """Trains in place. The rate falls with the larger of two shares: of the steps, of the time."""
    windows = args.windows
    tokens = torch.from_numpy(data).to(device)
    steps = max(1, int(args.epochs * (len(data) - 1) / (windows * WINDOW)))
    span = torch.arange(WINDOW + 1, device=device)
    check = torch.from_numpy(held[: (len(held) - 1) // WINDOW * WINDOW + 1]).to(device).long()
    check_in, check_out = check[:-1].view(-1, WINDOW), check[1:].view(-1, WINDOW)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    rng = np.random.default_rng(args.seed)

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().view(-1, VOCAB), targets.reshape(-1))

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            parts = [loss_of(a, b) for a, b in zip(check_in.split(32), check_out.split(32), strict=True)]
            sizes = [len(a) for a in check_in.split(32)]
        model.train()
        return sum(p.item() * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes)

    compute = loss_of
    if device.type == "cuda" and not args.eager:
        try:
            compute = torch.compile(loss_of)
            compute(check_in[:1].repeat(windows, 1), check_out[:1].repeat(windows, 1)).backward()
            optimizer.zero_grad()
            log.stage("compiled")
        except Exception as error:  # the eager path is slower and the same
            log.stage(f"not compiled, eager instead: {type(error).__name__}: {str(error)[:300]}")
            compute = loss_of
    model.train()
    starts, step, curve = np.array([], dtype=np.int64), 0, []
    begin = mark = time.monotonic()
    marked, used = 0, 0.0
    warm = max(1, min(200, steps // 10))
    log(f"training: {len(data)} tokens, {steps} steps of {windows} windows of {WINDOW}")
    while step < steps:
        used = max(step / steps, (time.monotonic() - begin) / (args.minutes_train * 60))
        if used >= 1:
            break
        if len(starts) < windows:  # an epoch begins: other window borders, another order
            fresh = np.arange(rng.integers(WINDOW), len(data) - WINDOW - 1, WINDOW)
            starts = np.concatenate([starts, rng.permutation(fresh)])
        take, starts = starts[:windows], starts[windows:]
        rows = tokens[torch.from_numpy(take).to(device)[:, None] + span].long()
        rate = args.lr * min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * used)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compute(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.every == 0 or step == steps:
            value = loss.item()
            speed = (step - marked) * windows * WINDOW / (time.monotonic() - mark)
            check_loss = validate()
            curve.append({"step": step, "loss": round(value, 4), "val": round(check_loss, 4)})
            log(f"step {step} loss {value:.4f} val {check_loss:.4f} lr {rate:.2e} tokens/s {speed:.0f}")
            mark, marked = time.monotonic(), step
    seconds = time.monotonic() - begin
    return {
        "steps": step,
        "planned_steps": steps,
        "epochs": round(step * windows * WINDOW / len(data), 2),
        "train_seconds": round(seconds, 1),
        "train_tokens_per_second": round(step * windows * WINDOW / seconds),
        "final_train_loss": round(loss.item(), 4),
        "final_validation_loss": round(validate(), 4),
    }


# ----------------------------------------------------------------------------------------- measurements


def perplexity(model: Any, ids: Tensor) -> float:
    """Windows of 512 that don't overlap; each predicts its last 511 tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in ids.split(8):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].double()
            total += F.cross_entropy(logits.reshape(-1, VOCAB), rows[:, 1:].reshape(-1), reduction="sum").item()
            count += rows[:, 1:].numel()
    return math.exp(total / count)


def round_to_nearest(model: Any, bits: int, group: int) -> float:
    """Rounds all linear layers of the decoder in place; returns their share of the parameters."""
    high = 2 ** (bits - 1)
    changed = 0
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.weight.data
                grouped = weight.view(weight.shape[0], -1, group)
                scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (high - 0.5)
                codes = (grouped / scale).round().clamp(-high, high - 1)
                module.weight.data = (codes * scale).view_as(weight)
                changed += weight.numel()
    return changed / sum(p.numel() for p in model.parameters())


def measure(folder: Path, text: Path, data: np.ndarray, device: torch.device, log: Log) -> dict[str, Any]:
    """Reloads what was saved and measures it in fp32 on the held-out text."""

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    raw = text.read_text()
    row = tokenizer(raw)["input_ids"]
    assert tokenizer.decode(row) == raw, "the tokenizer does not give the text back"
    assert len(tokenizer) == VOCAB
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 0, 0]
    ids = torch.tensor(row[: len(row) // WINDOW * WINDOW], device=device).view(-1, WINDOW)
    counts = np.bincount(data, minlength=VOCAB) + 1.0
    surprise = torch.from_numpy(-np.log(counts / counts.sum()))
    model = load()
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_windows": len(ids),
        "bytes_per_token": round(len(raw.encode()) / len(row), 3),
        "perplexity": perplexity(model, ids),
        "unigram_perplexity": math.exp(surprise[ids[:, 1:].cpu()].mean().item()),
    }
    figures["unigram_over_model"] = figures["unigram_perplexity"] / figures["perplexity"]
    for bits in (4, 3):
        rounded = load()
        share = round_to_nearest(rounded, bits, 64)
        value = perplexity(rounded, ids)
        figures[f"rtn{bits}_g64_perplexity"] = value
        figures[f"rtn{bits}_g64_rise"] = value / figures["perplexity"] - 1
    figures["rounded_share_of_parameters"] = share
    torch.manual_seed(0)
    for opening in (
        "Once upon a time",
        "The water cycle is",
        "Dear Anna,",
        "To make tomato soup, you need",
        "def ",
    ):
        start = tokenizer(opening, return_tensors="pt").to(device)
        start.pop("token_type_ids", None)
        out = model.generate(**start, max_new_tokens=90, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0)
        log(f"sample: {tokenizer.decode(out[0])!r}")
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}


def card(figures: dict[str, Any], command: str) -> str:
    """The model card."""
    f = figures
    return f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: text-generation
library_name: transformers
tags: [synthetic-text, tiny, test-model]
---

# A tiny Llama for tests of compression

A Llama with {f["parameters"]:,} parameters: 4 layers, hidden size 256, intermediate size 768, 4 heads,
2 key/value heads, head size 64, vocabulary {VOCAB}, tied embeddings, at most {WINDOW} positions, bf16.
It has its own byte-level BPE tokenizer. `{EOT}` is the only special token. No token is added by itself.

It exists so that compression can be tried and measured in seconds on any machine. It writes plain English
that holds together for a sentence or two. What it says is often false. Use it for nothing else.

## Data

All text was sampled from SmolLM2-135M-Instruct (Apache-2.0), from a copy of its weights in 4-bit form
(Q4_1) that was turned back into bf16. No weight of that model is in this one. The prompts are made in the
training script from templates, topics and names: stories, explanations, letters, dialogues, lists, recipes,
instructions, news, poems, diaries, some code. About a seventh of the prompts are short openings without a
chat template, which the document keeps. Sampling: temperature {f["temperature"]}, top-k {f["top_k"]}, min-p
{f["min_p"]}. A document ends before its first repeated run of seven words. Documents that were still
repetitive or very short were dropped, and so were blank lines inside documents.
{f["documents_kept"]:,} documents of {f["documents_written"]:,} stayed, {f["megabytes"]} MB in all.
{f["train_documents"]:,} were for training ({f["train_tokens"]:,} tokens). `calib/text/calibration.txt` and
`calib/text/heldout.txt` hold other documents of the same kind, with a blank line between them.

## Training

    {command}

{f["steps"]} steps of {f["windows"]} windows of {WINDOW} tokens ({f["epochs"]} epochs), AdamW, peak rate
{f["lr"]}, cosine, bf16 autocast over fp32 weights, {f["train_seconds"]} s on one {f["device"]}.
Last validation loss {f["final_validation_loss"]}.

## Measured

On `calib/text/heldout.txt`, {f["heldout_windows"]} windows of {WINDOW} tokens that don't overlap, fp32
arithmetic:

| weights | perplexity | rise |
| --- | --- | --- |
| unigram model of the training tokens | {f["unigram_perplexity"]:.2f} | |
| bf16 as saved | {f["perplexity"]:.3f} | |
| 4-bit round-to-nearest, groups of 64 | {f["rtn4_g64_perplexity"]:.3f} | {f["rtn4_g64_rise"]:+.1%} |
| 3-bit round-to-nearest, groups of 64 | {f["rtn3_g64_perplexity"]:.3f} | {f["rtn3_g64_rise"]:+.1%} |

The two rounded rows change all linear layers of the decoder, {f["rounded_share_of_parameters"]:.0%} of the
parameters. The scale is absmax / 3.5 or absmax / 7.5. With it the largest weight of a group lies half-way
between two codes, so another machine can round it the other way, and the 3-bit row can move by about a
percent.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes-generate", type=float, default=2.5)
    parser.add_argument("--minutes-train", type=float, default=2.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2048, help="sequences written at the same time")
    parser.add_argument("--round", type=int, default=640, help="steps of a round, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=10**6, help="most rounds")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--min-p", type=float, default=0.04)
    parser.add_argument("--windows", type=int, default=64, help="windows in a training step")
    parser.add_argument("--epochs", type=float, default=4.0, help="most passes over the data")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between log lines")
    parser.add_argument("--documents", help="documents.jsonl of an earlier run, instead of writing new ones")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    args = parser.parse_args()

    out = Path(args.out)
    tiny, text = out / "tiny", out / "text"
    for folder in (tiny, text):
        folder.mkdir(parents=True, exist_ok=True)
    # the workers start before any thread or device context exists
    workers = max(1, (os.cpu_count() or 2) - 2)
    tokenizer_file = str(Path(args.teacher) / "tokenizer.json")
    pool = multiprocessing.get_context("fork").Pool(workers, start_worker, (tokenizer_file,))
    transformers.utils.logging.disable_progress_bar()
    log = Log(out / "train.log")
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("highest")
    place = torch.cuda.get_device_name().removeprefix("NVIDIA ") if device.type == "cuda" else "CPU"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    log(f"device: {place}; versions: {json.dumps(versions)}; seed {args.seed}")
    options = {k: v for k, v in vars(args).items() if k not in ("teacher", "out", "device", "documents")}
    log(f"options: {json.dumps(options)}")

    if args.documents:
        figures, *texts = [json.loads(line) for line in Path(args.documents).read_text().splitlines()]
        log.stage(f"documents of an earlier run: {json.dumps(figures)}")
    else:
        texts, figures = generate(args, device, log, pool)
        lines = [json.dumps(entry) + "\n" for entry in [figures, *texts]]
        (out / "documents.jsonl").write_text("".join(lines))
    pool.close()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    parts = split(texts, args.seed)
    for name in ("calibration", "heldout"):
        (text / f"{name}.txt").write_text("\n\n".join(parts[name]) + "\n")
    log.stage("split: " + ", ".join(f"{name} {len(part)}" for name, part in parts.items()))
    for document in parts["heldout"][:3]:
        log(f"a document: {document[:400]!r}")

    sample, size = [], 0
    for document in parts["train"]:
        sample.append(document)
        size += len(document)
        if size > 30_000_000:
            break
    tokenizer = make_tokenizer(sample, tiny)
    log.stage(f"tokenizer: {tokenizer.get_vocab_size()} tokens from {size / 1e6:.1f} MB")
    data = stream(tokenizer, parts["train"], args.seed)
    held = stream(tokenizer, parts["validation"], args.seed)
    log.stage(f"packed: {len(data)} training tokens, {len(held)} validation tokens")

    torch.manual_seed(args.seed)
    model = student(device)
    figures |= train(args, model, data, held, device, log)
    log.stage("trained")
    model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(tiny)
    figures |= {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "lr": args.lr,
        "windows": args.windows,
    }
    figures |= {
        "train_documents": len(parts["train"]),
        "train_tokens": len(data),
        "device": place,
        "seed": args.seed,
    }
    figures |= measure(tiny, text / "heldout.txt", data, device, log)
    figures["files_megabytes"] = round(sum(p.stat().st_size for p in [*tiny.iterdir(), *text.iterdir()]) / 1e6, 2)
    given = list(sys.argv[1:])
    for flag, stand_in in (("--teacher", "SMOLLM2_DIR"), ("--out", "OUT"), ("--documents", "DOCUMENTS")):
        if flag in given:
            given[given.index(flag) + 1] = stand_in
    (tiny / "README.md").write_text(card(figures, "python reports/bundled-model/train.py " + " ".join(given)))
    log.stage("done")
    log(json.dumps(figures | versions))


if __name__ == "__main__":
    main()
