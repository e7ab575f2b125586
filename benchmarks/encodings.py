"""How often the encoding of a text is found: encodings × languages × lengths, beside what charset-normalizer says.

    python benchmarks/encodings.py [--json]

A text is right where its bytes, decoded by what was found, give it back. The texts are sentences written for this
table; a length is one sentence, all of them once, and all of them eight times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from rwkv_stream.text.readers.encodings import SAMPLE_BYTES, decided, decoded

LENGTHS = {"a sentence": 1, "a paragraph": 4, "a page": 32}

TEXTS = {
    "French": "Où irons-nous après la fête, dit l'aîné à sa soeur cadette. Les élèves étaient très fatigués. "
    "La forêt était calme, et le château brillait là-bas. Personne ne sut d'où venait la lettre reçue à Noël.",
    "German": "Die Kinder spielten im Garten, während die Mutter kochte. Niemand wußte, woher der Brief kam. "
    "Über den Dächern hörte man die Glocken läuten. Schöne Grüße aus München und Köln.",
    "Spanish": "El anciano llegó de muy lejos, ¿verdad? Los niños jugaban en el jardín por la mañana. "
    "Nadie sabía de dónde había llegado la carta. La montaña está más allá del río pequeño.",
    "Finnish": "Äiti keitti päivällistä, kun lapset leikkivät pihalla. Vanha mies tuli kaukaa metsästä. "
    "Kukaan ei tiennyt, mistä kirje tuli. Tänään sää on lämmin ja järvi tyyni.",
    "Hungarian": "Őszintén szólva, nem hittem volna, hogy ilyen gyorsan megérkezik a hűvös őszi szél. "
    "A gyerekek a kertben játszottak. Nem tudta senki, honnan érkezett a levél. Az öregember csendben ült a tűz körül.",
    "Czech": "Starý muž přišel z daleka a všichni tiše seděli kolem ohně. Děti si hrály na zahradě. "
    "Nikdo nevěděl, odkud dopis přišel. Upřímně řečeno, podzimní vítr dorazil do údolí příliš rychle.",
    "Polish": "Starzec przyszedł z daleka i wszyscy siedzieli cicho. Dzieci bawiły się w ogrodzie. "
    "Nikt nie wiedział, skąd przyszedł list, lecz pieczęć była stara. Szczerze mówiąc, wiatr dotrze tu szybko.",
    "Romanian": "Bătrânul a venit de departe şi toţi stăteau tăcuţi în jurul focului. Copiii se jucau în grădină. "
    "Nimeni nu ştia de unde a venit scrisoarea. Vântul de toamnă ajunge repede în vale.",
    "Croatian": "Starac je došao izdaleka i svi su tiho sjedili oko vatre. Djeca su se igrala u vrtu, a majka je "
    "kuhala ručak. Nitko nije znao odakle je stiglo pismo. Iskreno rečeno, vjetar šalje lišće naokolo.",
    "Turkish": "Yaşlı adam uzun bir yoldan geldi. Çocuklar bahçede oynarken anneleri öğle yemeği pişiriyordu. "
    "Mektubun nereden geldiğini kimse bilmiyordu. Açıkçası, sonbahar rüzgârı vadiye çabuk ulaştı.",
    "Lithuanian": "Senis atėjo iš toli, ir visi tyliai sėdėjo aplink ugnį. Vaikai žaidė sode. "
    "Niekas nežinojo, iš kur atėjo laiškas. Atvirai kalbant, rudens vėjas greitai pasiekė slėnį.",
    "Latvian": "Vecais vīrs atnāca no tālienes, un visi klusi sēdēja ap uguni. Bērni spēlējās dārzā. "
    "Neviens nezināja, no kurienes pienākusi vēstule. Rudens vējš ātri sasniedza ieleju.",
    "Russian": "Все счастливые семьи похожи друг на друга. Каждая несчастливая семья несчастлива по-своему. "
    "Никто не знал, откуда пришло письмо. Дети играли в саду, пока мать готовила обед.",
    "Ukrainian": "Старий чоловік прийшов здалеку, і всі тихо сиділи біля вогню. Діти гралися в саду. "
    "Ніхто не знав, звідки прийшов лист. Їхня мати готувала обід, а пес спав біля воріт.",
    "Greek": "Ο γέρος ήρθε από μακριά και όλοι κάθονταν σιωπηλοί γύρω από τη φωτιά. Τα παιδιά έπαιζαν στον κήπο. "
    "Κανείς δεν ήξερε από πού ήρθε το γράμμα. Ο άνεμος του φθινοπώρου έφτασε γρήγορα.",
    "Hebrew": "הזקן בא ממרחקים וכולם ישבו בשקט סביב האש. הילדים שיחקו בגן. "
    "איש לא ידע מאין הגיע המכתב. רוח הסתיו הגיעה מהר אל העמק.",
    "Arabic": "جاء الرجل العجوز من بعيد وجلس الجميع في صمت حول النار. كان الأطفال يلعبون في الحديقة. "
    "لم يعرف أحد من أين جاءت الرسالة. وصلت ريح الخريف إلى الوادي بسرعة.",
    "Thai": "ชายชรามาจากแดนไกลและทุกคนนั่งเงียบรอบกองไฟ เด็กๆ เล่นอยู่ในสวน ไม่มีใครรู้ว่าจดหมายมาจากไหน. "
    "ลมฤดูใบไม้ร่วงมาถึงหุบเขาอย่างรวดเร็ว. สุนัขนอนอยู่ข้างประตู.",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。",
    "Chinese": "天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。"
    "汉朝自高祖斩白蛇而起义，一统天下。",
    "Chinese, traditional": "天下大勢，分久必合，合久必分。周末七國分爭，並入於秦。及秦滅之後，楚、漢分爭，又並入於漢。"
    "漢朝自高祖斬白蛇而起義，一統天下。",
    "Korean": "노인은 먼 곳에서 왔고 모두 불 주위에 조용히 앉아 있었다. 아이들은 정원에서 놀고 있었다. "
    "편지가 어디서 왔는지 아무도 몰랐다. 가을 바람이 골짜기에 빨리 도착했다.",
}
_CENTRAL = ("Hungarian", "Czech", "Polish", "Romanian", "Croatian")
ENCODINGS: dict[str, tuple[str, ...]] = {
    "utf-8": ("French", "Hungarian", "Russian", "Japanese"),
    "cp1252": ("French", "German", "Spanish", "Finnish"),
    "iso8859-15": ("French", "German", "Finnish"),
    "cp1250": _CENTRAL,
    "iso8859-2": _CENTRAL,
    "cp1251": ("Russian", "Ukrainian"),
    "koi8-r": ("Russian",),
    "koi8-u": ("Ukrainian",),
    "iso8859-5": ("Russian", "Ukrainian"),
    "cp866": ("Russian",),
    "mac-cyrillic": ("Russian",),
    "cp1253": ("Greek",),
    "iso8859-7": ("Greek",),
    "cp1254": ("Turkish",),
    "iso8859-9": ("Turkish",),
    "cp1255": ("Hebrew",),
    "iso8859-8": ("Hebrew",),
    "cp1256": ("Arabic",),
    "iso8859-6": ("Arabic",),
    "cp1257": ("Lithuanian", "Latvian"),
    "iso8859-13": ("Lithuanian", "Latvian"),
    "cp874": ("Thai",),
    "cp932": ("Japanese",),
    "euc_jp": ("Japanese",),
    "iso2022_jp": ("Japanese",),
    "gb18030": ("Chinese",),
    "hz": ("Chinese",),
    "big5": ("Chinese, traditional",),
    "cp949": ("Korean",),
    "cp850": ("French", "German", "Spanish"),
    "cp852": ("Polish", "Hungarian"),
    "mac-roman": ("French", "German"),
}


def samples(language: str, length: int) -> Iterator[str]:
    """Texts of so many sentences, each beginning with another."""
    mark = "。" if "。" in TEXTS[language] else ". "
    sentences = [part.strip() + mark.strip() for part in TEXTS[language].split(mark) if part.strip()]
    for i in range(len(sentences)):
        yield "\n".join((sentences[i:] + sentences[:i]) * 8 if length > 4 else (sentences[i:] + sentences[:i])[:length])


def ours(data: bytes) -> str | None:
    decision = decided(data[:SAMPLE_BYTES], None)
    return None if decision is None else decision.name


def charset_normalizer(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    best = from_bytes(data).best()
    return None if best is None else best.encoding


def is_right(data: bytes, text: str, encoding: str | None) -> bool:
    return encoding is not None and decoded(data, encoding) == text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="a JSON object for each row")
    options = parser.parse_args()
    totals = {length: [0, 0, 0] for length in LENGTHS}
    table = []
    for encoding, languages in ENCODINGS.items():
        for language in languages:
            for name, length in LENGTHS.items():
                counts = [0, 0, 0]
                for text in samples(language, length):
                    data = text.encode(encoding)
                    found = is_right(data, text, ours(data)), is_right(data, text, charset_normalizer(data))
                    for i, one in enumerate((1, *found)):
                        counts[i] += one
                        totals[name][i] += one
                table.append({"encoding": encoding, "language": language, "length": name, "texts": counts[0],
                              "right": counts[1], "charset_normalizer": counts[2]})  # fmt: skip
    if options.json:
        for row in table:
            print(json.dumps(row))
        return
    print(f"{'encoding':14}{'language':22}" + "".join(f"{name:>22}" for name in LENGTHS))
    for row in table[:: len(LENGTHS)]:
        same = [r for r in table if (r["encoding"], r["language"]) == (row["encoding"], row["language"])]
        cells = (f"{r['right']} of {r['texts']} ({r['charset_normalizer']})" for r in same)
        print(f"{row['encoding']:14}{row['language']:22}" + "".join(f"{cell:>22}" for cell in cells))
    for name, (n, right, theirs) in totals.items():
        print(f"{name}: {right} of {n} are right; charset-normalizer alone: {theirs}")


if __name__ == "__main__":
    main()
