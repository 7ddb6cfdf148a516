//! `${NAME}` and `${NAME:-default}` inside string values.
//!
//! Substitution happens after parsing, so a variable can never add keys or lines.

/// Replaces the variables in a text, or says which is missing or malformed.
pub(super) fn substitute(
    text: &str,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<String>, (String, String)> {
    if !text.contains("${") {
        return Ok(None);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        out.push_str(&rest[..start]);
        let inner = &rest[start + 2..];
        let end = inner
            .find('}')
            .ok_or_else(|| ("unclosed `${`".to_owned(), "write `${NAME}` or `${NAME:-default}`".to_owned()))?;
        let (name, default) = match inner[..end].split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (&inner[..end], None),
        };
        if default.is_some_and(|default| default.contains("${")) {
            return Err((
                "a variable inside a default".to_owned(),
                "defaults are plain text; set the variable itself".to_owned(),
            ));
        }
        let valid = !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !valid {
            return Err((
                format!("not a variable's name: `{name}`"),
                "write `${NAME}` or `${NAME:-default}`; a name has letters, digits and `_`".to_owned(),
            ));
        }
        // As in a shell, `:-` also replaces an empty value.
        match (variable(name).filter(|value| default.is_none() || !value.is_empty()), default) {
            (Some(value), _) => out.push_str(&value),
            (None, Some(default)) => out.push_str(default),
            (None, None) => {
                return Err((
                    format!("environment variable not set: `{name}`"),
                    format!("set it, or give a default: `${{{name}:-…}}`"),
                ));
            }
        }
        rest = &inner[end + 1..];
    }
    out.push_str(rest);
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::substitute;

    #[test]
    fn variables_defaults_and_what_is_wrong() {
        let env = |name: &str| match name {
            "HOST" => Some("h".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let ok = |text| substitute(text, &env).unwrap();
        assert_eq!(ok("plain $HOME"), None);
        assert_eq!(ok("http://${HOST}:${PORT:-80}").as_deref(), Some("http://h:80"));
        assert_eq!(ok("${EMPTY:-x}${EMPTY}").as_deref(), Some("x"));
        assert_eq!(ok("${NONE:-}").as_deref(), Some(""));
        for wrong in ["${NONE}", "${", "${A", "${}", "${1A}", "${A B}", "${A:-${B}}"] {
            assert!(substitute(wrong, &env).is_err(), "{wrong}");
        }
    }
}
