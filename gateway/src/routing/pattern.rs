//! Which paths a rule takes: literals, `{id}` for one segment, `**` for all below.

use super::path::literal_segment;

/// One segment of a pattern.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// This very segment, in its matched form.
    Literal(Box<[u8]>),
    /// One segment, whatever it is.
    Param,
    /// Nothing more, or anything; always last.
    Rest,
}

/// A path pattern. Two patterns that take the same paths are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern {
    parts: Vec<Part>,
}

impl Pattern {
    /// Reads a pattern, or says what is wrong with it and what to write.
    pub fn parse(text: &str, case_insensitive: bool) -> Result<Self, (String, String)> {
        let told = |message: String, help: String| Err((message, help));
        let Some(rest) = text.strip_prefix('/') else {
            return told(format!("path without a leading `/`: `{text}`"), format!("write `/{text}`"));
        };
        if let Some(at) = text.find(['?', '#']) {
            return told(
                format!("path with a `{}`: `{text}`", &text[at..=at]),
                "match query parameters with `query:`".to_owned(),
            );
        }
        if rest.is_empty() {
            return Ok(Self { parts: Vec::new() });
        }
        if rest.ends_with('/') {
            let text = text.trim_end_matches('/');
            return told(
                format!("path with a trailing `/`: `{text}/`"),
                format!(
                    "a trailing `/` is ignored in requests: write `{text}` for the path itself, `{text}/**` for all below it too"
                ),
            );
        }
        let mut parts = Vec::new();
        for (n, segment) in rest.split('/').enumerate() {
            let last = n == rest.matches('/').count();
            parts.push(match segment {
                "**" if last => Part::Rest,
                "**" => {
                    return told(
                        format!("`**` in the middle of a path: `{text}`"),
                        "`**` takes all that is left, so it stands last; `{name}` takes one segment".to_owned(),
                    );
                }
                _ if segment.starts_with('{') && segment.ends_with('}') => {
                    let name = &segment[1..segment.len() - 1];
                    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                        return told(
                            format!("not a parameter's name: `{segment}`"),
                            "write `{id}`: letters, digits and `_`".to_owned(),
                        );
                    }
                    Part::Param
                }
                _ if segment.contains(['*', '{', '}']) => {
                    return told(
                        format!("not a whole segment: `{segment}`"),
                        "`{id}` takes one whole segment and `**` all that is left; parts of a segment are not matched"
                            .to_owned(),
                    );
                }
                _ => match literal_segment(segment, case_insensitive) {
                    Ok(key) => Part::Literal(key.into()),
                    Err(why) => return told(format!("path that matches nothing: `{text}`"), why),
                },
            });
        }
        Ok(Self { parts })
    }

    /// The segments.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Whether a path in its matched form is taken. The table does not use this: it explains and checks.
    pub fn matches(&self, key: &[u8]) -> bool {
        let mut segments = segments(key);
        for part in &self.parts {
            match (part, segments.next()) {
                (Part::Rest, _) => return true,
                (_, None) => return false,
                (Part::Literal(literal), Some(segment)) if **literal != *segment => return false,
                (Part::Literal(_) | Part::Param, Some(_)) => {}
            }
        }
        segments.next().is_none()
    }

    /// Whether every path that this pattern takes starts with these segments.
    pub fn is_below(&self, prefix: &[Box<[u8]>]) -> bool {
        self.parts.len() >= prefix.len()
            && self
                .parts
                .iter()
                .zip(prefix)
                .all(|(part, wanted)| matches!(part, Part::Literal(literal) if literal == wanted))
    }
}

/// The segments of a matched path.
pub fn segments(key: &[u8]) -> impl Iterator<Item = &[u8]> {
    (!key.is_empty()).then(|| key.split(|&byte| byte == b'/')).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(pattern: &str, key: &str) -> bool {
        Pattern::parse(pattern, false).unwrap().matches(key.as_bytes())
    }

    #[test]
    fn exact_param_and_rest() {
        assert!(takes("/orders", "orders") && !takes("/orders", "orders/1"));
        assert!(takes("/orders/{id}", "orders/1") && !takes("/orders/{id}", "orders"));
        assert!(takes("/orders/**", "orders") && takes("/orders/**", "orders/1/2"));
        assert!(!takes("/orders/**", "ordersX"));
        assert!(takes("/", "") && takes("/**", "") && takes("/**", "a/b") && !takes("/", "a"));
    }

    #[test]
    fn what_can_match_nothing_is_refused() {
        for pattern in [
            "", "orders", "/orders/", "/a//b", "/a/../b", "/a/**/b", "/a*", "/{a}x", "/{}", "/{a-b}", "/a?b", "/a;b",
            "/%2f", "/a%",
        ] {
            assert!(Pattern::parse(pattern, false).is_err(), "{pattern}");
        }
    }
}
