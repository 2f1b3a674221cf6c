//! Pages for a browser, each in one file: nothing is fetched, nothing is sent, and only what was written here is run.
//!
//! A policy in the page itself says so to the browser: it takes the page's own style and script, by their sums, and nothing
//! else, whatever a name that came from elsewhere may hold.

use std::path::Path;

use anyhow::Context as _;
use sha2::Digest as _;
use sha2::Sha256;

/// What all pages have in common.
const STYLE: &str = include_str!("page.css");

/// A page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page<'a> {
    /// Its title, as it is.
    pub(crate) title: &'a str,
    /// Style behind what all pages have.
    pub(crate) style: &'a str,
    /// What the page runs.
    pub(crate) script: Option<&'a str>,
    /// What the script reads, as JSON.
    pub(crate) data: Option<&'a str>,
    /// Its body, as HTML.
    pub(crate) body: &'a str,
}

impl Page<'_> {
    /// The file.
    pub(crate) fn html(&self) -> String {
        let style = format!("{STYLE}{}", self.style);
        let mut policy =
            format!("default-src 'none'; base-uri 'none'; form-action 'none'; style-src '{}'", sum(&style));
        let mut end = String::new();
        if let Some(data) = self.data {
            end += &format!("<script type=\"application/json\" id=data>{}</script>\n", in_script(data));
        }
        if let Some(script) = self.script {
            policy += &format!("; script-src '{}'", sum(script));
            end += &format!("<script>{script}</script>\n");
        }
        format!(
            "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
             <meta name=referrer content=no-referrer>\n<meta name=color-scheme content=\"light dark\">\n\
             <meta name=viewport content=\"width=device-width, initial-scale=1\">\n\
             <title>{}</title>\n<style>{style}</style>\n</head>\n<body>\n{}\n{end}</body>\n</html>\n",
            escape(self.title),
            self.body,
        )
    }

    /// Writes it.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, self.html()).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The sum of a style or script, as a policy names it.
fn sum(text: &str) -> String {
    format!("sha256-{}", base64(&Sha256::digest(text.as_bytes())))
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().chain(&[0; 2]).take(3).fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        for place in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * place) & 63) as usize];
            text.push(if place > chunk.len() { '=' } else { char::from(letter) });
        }
    }
    text
}

/// JSON that stands in a page: no end of a script, and no begin of a comment, can be in it. Outside of its texts it has none of
/// these letters.
fn in_script(json: &str) -> String {
    let hidden = |letter: char| matches!(letter, '<' | '>' | '&') || (steers(letter) && letter != '\n');
    let mut safe = String::with_capacity(json.len());
    for letter in json.chars() {
        match hidden(letter) {
            true => safe += &format!("\\u{:04x}", u32::from(letter)),
            false => safe.push(letter),
        }
    }
    safe
}

/// Letters that a terminal obeys, that turn the direction of writing, or that nobody sees.
fn steers(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A text as HTML shows it; what a terminal would obey, and what turns the direction of writing, by its number.
pub(crate) fn escape(text: &str) -> String {
    let mut shown = String::new();
    for letter in line(text).chars() {
        match letter {
            '&' => shown += "&amp;",
            '<' => shown += "&lt;",
            '>' => shown += "&gt;",
            '"' => shown += "&quot;",
            '\'' => shown += "&#39;",
            letter => shown.push(letter),
        }
    }
    shown
}

/// A text in one line of a terminal, which obeys nothing in it.
pub(crate) fn line(text: &str) -> String {
    text.chars()
        .map(|letter| if steers(letter) { letter.escape_unicode().to_string() } else { letter.to_string() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "</script><!--<b onload='x'>&\"\u{1b}[2J\u{202e}";

    #[test]
    fn sums_are_those_that_a_browser_computes() {
        // Of the empty text and of "abc", as FIPS 180-4 has them.
        assert_eq!(sum(""), "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
        assert_eq!(sum("abc"), "sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=");
        let encoded = ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes()));
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]);
    }

    #[test]
    fn a_page_runs_its_own_script_alone_and_knows_no_other_host() {
        let data = serde_json::to_string(HOSTILE).unwrap();
        let script = "let a = 1 < 2;";
        let body = format!("<p>{}</p>", escape(HOSTILE));
        let page =
            Page { title: HOSTILE, style: "p{}", script: Some(script), data: Some(&data), body: &body }
                .html();
        assert!(page.contains(&format!("script-src '{}'", sum(script))));
        assert!(page.contains(&format!("style-src '{}'", sum(&format!("{STYLE}p{{}}")))));
        assert!(page.contains("default-src 'none'") && !page.contains("unsafe-"));
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script>").count(), 2);
        for never in
            ["<b ", "<!--", "\u{1b}", "\u{202e}", "http:", "https:", "//", "url(", "@import", "style="]
        {
            assert!(!page.contains(never), "{never:?}");
        }
    }

    #[test]
    fn what_steers_a_terminal_is_shown_by_its_number() {
        assert_eq!(line("a\u{1b}[2J\n\u{202e}ö"), "a\\u{1b}[2J\\u{a}\\u{202e}ö");
        assert_eq!(escape("<a href='x'>&\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;");
    }
}
