"""A folder in the layout of LongProc's `data`, with problems and prompts of our own."""

import json
from pathlib import Path

PAGES = {"long.html": "<ul>" + "<li>Pear, 3</li><li>Fig, 4</li>" * 60 + "</ul>", "short.html": "<li>Pear, 3</li>"}

PROMPTS = {
    "html_to_tsv": "{html_str}\n{task_topic}: {task_description}{filtering_instruction}\n{tsv_header}\n{{a line}}\n",
    "path_traversal": "{city_context}\nFrom {src_city} to {dst_city}:\n",
    "countdown": "{demonstration}\n\nNumbers: {nums}\nTarget: {target}\n",
}


def write_longproc(folder: Path) -> Path:
    """Writes the folder, three problems of each task at every level; returns it."""
    for task, prompt in PROMPTS.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "prompts.yaml").write_text(json.dumps({"USER_PROMPT": prompt}))
        for level in ("0.5k", "2k", "8k"):
            records = [_record(task, number) for number in range(3)]
            (folder / task / f"{task}_{level}.json").write_text(json.dumps(records))
    (folder / "html_to_tsv" / "webpage").mkdir()
    for name, page in PAGES.items():
        (folder / "html_to_tsv" / "webpage" / name).write_text(page)
    return folder


def _record(task: str, number: int) -> dict:
    if task == "html_to_tsv":
        page = "short.html" if number == 1 else "long.html"
        words = {"task_topic": "fruit", "task_description": "(1) name; (2) price", "filtering_instruction": ""}
        return {"html_path": f"webpage/{page}", "tsv_header": "name\tprice", "gt": "name\tprice\nPear\t3\n", **words}
    if task == "path_traversal":
        route = f"From Ulm, take a bus to Bonn.\nFrom Bonn, take a ferry to Kiel{number}."
        return {"context_nl": "Cities.", "question_repr": ["Ulm", f"Kiel{number}"], "answer_nl": route}
    numbers, target = (([21, 16, 17, 26], 46), ([1, 1, 1, 1], 4), ([9, 9, 2, 0], 20))[number]
    return {"nums": numbers, "target": target}
