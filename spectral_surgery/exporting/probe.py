"""Built-in texts on which two models are compared where the user names no rows: prose, dialogue, mathematics, code."""

from __future__ import annotations

from spectral_surgery.formats import Example

TEXTS = (
    "The harbour was quiet in the morning, and the fishermen mended their nets while the gulls waited on the wall.",
    "Question: A train leaves at 9:40 and arrives at 13:25. How long does the journey take? Answer: The journey takes "
    "3 hours and 45 minutes.",
    "def mean(values):\n    if not values:\n        raise ValueError\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils at a lower temperature because the "
    "pressure of the air is lower.",
    "User: Can you recommend a book about the history of astronomy?\nAssistant: Of course. Do you prefer an overview, "
    "or one that follows a single astronomer?",
    "Let x + 3 = 2x - 5. Subtracting x from both sides gives 3 = x - 5, so x = 8. Check: 8 + 3 = 11 and 16 - 5 = 11.",
    "SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON orders.customer = customers.id GROUP BY name;",
    "Dear Ms Novak, thank you for your letter of 3 May. We are glad to confirm your booking for two nights.",
    "In 1869 Mendeleev arranged the elements by weight and left gaps for those that nobody had found yet.",
    'for (int i = 0; i < n; i++) {\n    total += prices[i] * amounts[i];\n}\nprintf("%d\\n", total);\n',
    "Add the flour and the salt, stir until the dough is smooth, cover it, and let it rest for an hour.",
    '{"name": "lamp", "price": 24.5, "colours": ["white", "black"], "in_stock": true}',
)


def sentences() -> list[Example]:
    """Returns the texts as examples that are all answer: a prediction is compared at every token but the first."""
    return [Example("", text, group=str(row), templated=False, row=row) for row, text in enumerate(TEXTS)]
