//! What was found, as a page for a browser.
//!
//! The page holds the JSON, and a script of its own that shows it: names go into it as text alone, whatever they are. Nodes of the
//! tree are made when they are unfolded, and the map has cells, however much memory there is.

use std::path::Path;

use super::Report;
use super::json;
use crate::page;
use crate::page::Page;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
const BODY: &str = include_str!("page.html");

/// Writes it to a file.
pub(super) fn write(path: &Path, report: &Report<'_>, source: &str) -> anyhow::Result<()> {
    with_page(report, source, |page| page.write(path))
}

fn with_page<T>(
    report: &Report<'_>,
    name: &str,
    act: impl FnOnce(&Page<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut data = Vec::new();
    json::write(&mut data, report)?;
    let data = String::from_utf8(data)?;
    let notes =
        [&report.source.holds].into_iter().chain(&report.source.notes).filter(|note| !note.is_empty());
    let notes: String = notes.map(|note| format!("<li>{}</li>", page::escape(note))).collect();
    let source = page::escape(name);
    let body = format!(
        "<h1>What is handed over</h1>\n<p class=soft>{source}</p>\n<ul class=soft>{notes}</ul>\n{BODY}"
    );
    let title = format!("{name}: what is handed over");
    act(&Page { title: &title, style: STYLE, script: Some(SCRIPT), data: Some(&data), body: &body })
}

#[cfg(test)]
mod tests {
    use survey::Survey;

    use super::*;
    use crate::inspect::source::Told;

    fn page(survey: &Survey, source: &str) -> String {
        let notes = vec![source.to_owned()];
        let told = Told { kind: "memory", name: source.to_owned(), holds: String::new(), notes };
        let report = Report { source: &told, survey, folios: None };
        with_page(&report, source, |page| Ok(page.html())).unwrap()
    }

    #[test]
    fn a_hostile_name_is_neither_markup_nor_script_nor_lost() {
        let hostile = "</script><img src=x onerror=alert(1)>\u{202e}\u{1b}[2J";
        let mut survey = Survey::default();
        survey.unread.push(hostile.to_owned());
        let page = page(&survey, hostile);
        // Its own two, and nothing that a name has brought.
        assert_eq!((page.matches("<script").count(), page.matches("</script>").count()), (2, 2));
        assert!(!page.contains("<img") && !page.contains('\u{202e}') && !page.contains('\u{1b}'));
        let data = page.split_once("id=data>").unwrap().1.split_once("</script>").unwrap().0;
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["unread"][0], hostile);
    }

    #[test]
    fn the_page_asks_nobody_for_anything_and_has_a_place_for_all_that_the_script_shows() {
        let page = page(&Survey::default(), "web1");
        assert!(page.contains("default-src 'none'") && page.contains("script-src 'sha256-"));
        for never in
            ["http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "innerHTML", "eval(", "unsafe-"]
        {
            assert!(!page.contains(never), "{never}");
        }
        for part in SCRIPT.split("find(\"").skip(1) {
            let id = part.split_once('"').unwrap().0;
            assert!(BODY.contains(&format!("id={id}")), "{id}");
        }
    }
}
