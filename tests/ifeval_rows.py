"""One IFEval row for each of its 25 kinds of instruction, with a response that follows it and one that does not."""

from __future__ import annotations

from typing import Any

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["river", "stone"]}, "A stone lies in the river.", "A stone lies there."),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        "The sun rose. The sun set.",
        "The sun rose.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, "All is well.", "All is bad."),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 3, "let_relation": "at least"},
        "Zig zag zone.",
        "Zig and zag.",
    ),
    (
        "language:response_language",
        {"language": "fr"},
        "Le petit chat dort toute la journée sur le canapé de la maison.",
        "The little cat sleeps on the sofa of the house all day long.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "Dr. Smith went home. He was tired. He slept.",
        "Dr. Smith went home. He was tired.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One and two."),
    (
        "length_constraints:number_words",
        {"num_words": 5, "relation": "less than"},
        "Only four words here.",
        "Here there are more words than that.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "First this.\n\nLater that.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [city]", "[name] of a city"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Dear all.\nP.S. Come soon.", "Dear all."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Of course."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one* and two"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nA.\nSection 2\nB.",
        "Section 1\nA.",
    ),
    ("detectable_format:json_format", {}, '{"answer": 3}', "answer: 3"),
    ("detectable_format:title", {}, "<<Song>>\nLa.", "Song\nLa."),
    ("combination:two_responses", {}, "One way.******Another way.", "One way."),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say something kind."},
        "Say something kind. You did well.",
        "You did well.",
    ),
    ("startend:end_checker", {"end_phrase": "That is all."}, "It rained. That is all.", "That is all. It rained."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "It was VERY COLD.",
        "It was VERY cold.",
    ),
    (
        "change_case:english_capital",
        {},
        "THE CAT SLEEPS ON THE SOFA ALL DAY LONG.",
        "The cat sleeps on the sofa all day long.",
    ),
    (
        "change_case:english_lowercase",
        {},
        "the cat sleeps on the sofa all day long.",
        "The cat sleeps on the sofa all day long.",
    ),
    ("punctuation:no_comma", {}, "No such sign here.", "Here, there is one."),
    ("startend:quotation", {}, '"All of it."', "None of it."),
]


def rows() -> list[dict[str, Any]]:
    """Rows in google/IFEval's form, with the two responses beside."""
    return [
        {
            "key": number,
            "prompt": f"Follow instruction {number}.",
            "instruction_id_list": [instruction],
            "kwargs": [arguments],
            "follows": follows,
            "violates": violates,
        }
        for number, (instruction, arguments, follows, violates) in enumerate(CASES)
    ]
