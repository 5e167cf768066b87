"""The tables of the RefreshKV paper (Xu, Goyal and Choi, ACL 2025) in the layout in which they are printed.

They are entered here once more, apart from configs/suites, so that a wrong cell in either is found. `a/b` are the
numbers of the two models named in `MODELS`; `-` is a cell that the paper leaves empty.
"""

MODELS = ("Llama-3.1-8B", "Qwen2-7B")

TABLES = {
    "paper-table-1": """
        arXiv | Books | seconds | stride, Books
        Vanilla: 2.22/2.33 | 7.07/8.26 | 7.50/9.07 | -
        StreamingLLM: 2.62/2.75 | 7.94/9.10 | 6.61/6.27 | -
        H2O: 2.48/2.68 | 7.60/9.02 | 10.77/11.57 | -
        SnapKV: 2.54/2.80 | 7.78/9.18 | 6.77/6.09 | -
        RefreshKV QC=5: 2.27/2.39 | 7.31/8.55 | 6.67/6.71 | 12/7
        RefreshKV QC=10: 2.32/2.49 | 7.41/8.72 | 6.33/6.33 | 17/11
    """,
    "paper-table-2": """
        RULER 32K | QMSum, ROUGE-L | GovReport, ROUGE-L | NovelSumm, ROUGE-L | HTML to TSV, F1
        Vanilla: 90/79 | 25.63/24.98 | 34.11/33.38 | 31.29/19.91 | 33/24
        StreamingLLM: 22/21 | 22.27/20.30 | 16.30/23.84 | 24.66/22.11 | 2/5
        H2O: 21/21 | 22.12/20.83 | 27.41/26.91 | 19.31/18.51 | 0/0
        SnapKV: 79/58 | 24.33/22.93 | 28.06/28.80 | 29.23/19.09 | 0/0
        RefreshKV QC=5: 86/75 | 24.92/24.34 | 32.56/31.40 | 29.98/19.70 | 17/10
        RefreshKV QC=10: 80/67 | 24.73/23.98 | 31.47/31.36 | 29.37/18.94 | 8/6
    """,
    "paper-table-3": """
        seconds, Books | stride, Books | Books | seconds, HTML | stride, HTML | HTML 0.5K, F1 | seconds, GovReport \
| stride, GovReport | GovReport, ROUGE-L
        Vanilla: 7.50/9.07 | - | 7.07/8.26 | 1.52/1.96 | - | 43/35 | 1.43/1.73 | - | 34.11/33.38
        fixed S=10: 7.20/6.59 | 10/10 | 7.40/8.74 | 1.40/1.38 | 10/10 | 17/8 | 1.37/1.29 | 10/10 | 32.30/31.18
        RefreshKV QC=5: 7.17/6.71 | 12/7 | 7.31/8.55 | 1.40/1.29 | 14/7 | 30/20 | 1.38/1.34 | 14/7 | 32.56/31.40
        fixed S=15: 6.99/6.43 | 15/15 | 7.45/8.81 | 1.37/1.31 | 15/15 | 8/9 | 1.34/1.27 | 15/15 | 30.67/30.73
        RefreshKV QC=10: 6.89/6.33 | 17/11 | 7.41/8.72 | 1.33/1.23 | 19/12 | 16/14 | 1.34/1.28 | 19/12 | 31.47/31.36
    """,
    "paper-table-4": """
        arXiv | HTML 0.5K, F1
        Vanilla: 2.22 | 43
        SnapKV: 2.54 | 0
        RefreshKV: 2.32 | 16
        without refresh: 2.50 | 0
        without full attention: 2.32 | 16
    """,
    "paper-table-5": """
        8K, before | 8K, after | 16K, before | 16K, after
        Vanilla: 2.70 | 2.70 | 2.50 | 2.50
        StreamingLLM: 3.40 | 3.38 | 3.50 | 3.49
        H2O: 3.95 | 3.90 | 3.52 | 3.49
        SnapKV: 3.21 | 3.15 | 2.98 | 2.92
        RefreshKV S=10: 2.83 | 2.79 | 2.57 | 2.56
        RefreshKV S=25: 2.97 | 2.93 | 2.67 | 2.63
        RefreshKV S=50: 3.13 | 3.05 | 2.79 | 2.72
    """,
    "paper-table-8": """
        arXiv | Books
        first head: 2.34/2.49 | 7.43/8.78
        mean: 2.32/2.47 | 7.40/8.73
        maximum: 2.32/2.47 | 7.40/8.72
    """,
    "paper-table-9": """
        Books | seconds
        Vanilla: 6.70/7.44 | 7.54/9.11
        QC=5, threshold 0.8: 6.92/7.86 | 6.42/6.50
        QC=5, threshold 0.85: 6.86/7.80 | 6.64/6.64
        QC=5, threshold 0.9: 6.88/7.73 | 7.01/6.91
        QC=5, threshold 0.95: 6.88/7.66 | 7.53/7.14
        QC=10, threshold 0.8: 6.95/7.95 | 6.37/6.37
        QC=10, threshold 0.85: 6.96/7.87 | 6.52/6.41
        QC=10, threshold 0.9: 6.96/7.84 | 6.54/6.62
        QC=10, threshold 0.95: 6.95/7.82 | 7.07/6.67
    """,
    "paper-table-10": """
        0.5K | 2K | 8K | mean
        Vanilla: 43/36 | 31/22 | 23/15 | 33/24
        StreamingLLM: 4/10 | 1/3 | 0/0 | 2/5
        H2O: 0/0 | 0/0 | 0/0 | 0/0
        SnapKV: 0/0 | 0/0 | 0/0 | 0/0
        RefreshKV QC=5: 31/20 | 15/6 | 4/3 | 17/10
        RefreshKV QC=10: 16/14 | 7/2 | 1/1 | 8/6
    """,
    "paper-table-13": """
        path traversal | ToM tracking | countdown | travel planning
        Vanilla: 17/7 | 40/12 | 67/11 | 62/48
        StreamingLLM: 0/2 | 0/0 | 0/6 | 0/0
        H2O: 0/2 | 0/0 | 0/6 | 2/0
        SnapKV: 1/0 | 0/0 | 12/14 | 0/2
        RefreshKV QC=5: 5/3 | 14/6 | 44/14 | 38/26
        RefreshKV QC=10: 1/2 | 5/2 | 42/10 | 18/4
    """,
    "paper-table-14": """
        single | multi_key | multi_query | multi_value | fwe | vt | cwe | qa
        Vanilla: 100/100 | 98/90 | 99/75 | 99/87 | 93/84 | 99/86 | 65/27 | 61/50
        H2O: 7/5 | 7/8 | 6/5 | 6/3 | 78/84 | 38/2 | 39/17 | 34/30
        StreamingLLM: 8/8 | 13/11 | 13/13 | 13/12 | 93/80 | 12/15 | 4/14 | 42/39
        SnapKV: 99/69 | 60/51 | 98/54 | 99/43 | 83/81 | 99/87 | 44/27 | 63/50
        RefreshKV QC=5: 100/99 | 91/79 | 98/70 | 99/85 | 81/70 | 99/87 | 44/27 | 60/50
        RefreshKV QC=10: 100/97 | 67/54 | 97/63 | 99/67 | 81/80 | 99/87 | 44/27 | 59/49
    """,
    "paper-figure-3": """
        Books
        Vanilla: 7.07
        SnapKV: 7.78
        RefreshKV S=10: 7.40
    """,
    "paper-figure-4": """
        Books | HTML 0.5K | GovReport
        RefreshKV QC=5: 12/7 | 14/7 | 14/7
        RefreshKV QC=10: 17/11 | 19/12 | 19/12
    """,
}

CHAIN_OF_KEY = """
        Chain-of-key
        Vanilla: 56/83
        StreamingLLM: 2/2
        H2O: 10/11
        SnapKV: 12/13
        RefreshKV QC=5: 25/24
        RefreshKV QC=10: 15/15
"""
"""The last column of table 2, which is of the models below."""
CHAIN_MODELS = ("Llama-3.1-70B", "Qwen2-72B")


def numbers(table: str, models: tuple[str, str] = MODELS) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> line -> column -> number."""
    header, *lines = [line.strip() for line in table.strip().splitlines()]
    columns = [title.strip() for title in header.split("|")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        label, _, cells = line.partition(": ")
        for column, cell in zip(columns, cells.split("|"), strict=True):
            for model, number in zip(models, cell.strip().split("/"), strict=False):
                if number != "-":
                    found.setdefault(model, {}).setdefault(label, {})[column] = float(number)
    return found
