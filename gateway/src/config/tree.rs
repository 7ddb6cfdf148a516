//! The file as a tree that still knows its duplicate keys, and where each node stands.
//!
//! `serde_yaml` gives no spans and lets a later duplicate win. So the text is read
//! into this tree first; a node's line and column are found, only when an error needs
//! them, by reading the text once more with a seed that walks to the node and fails there.
//! Nothing here knows what a key means.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor, value},
    forward_to_deserialize_any,
};

/// One node of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Tree {
    /// An empty value or `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// A string.
    Text(String),
    /// A list.
    Seq(Vec<Tree>),
    /// A map in file order, duplicates kept.
    Map(Vec<(String, Tree)>),
}

/// A step down the tree: the n-th entry of a map or list.
pub(super) type Step = usize;

/// What to point at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The way down from the root.
    pub steps: Vec<Step>,
    /// The key of the last step's entry instead of its value.
    pub key: bool,
}

impl Tree {
    /// Reads a text.
    pub fn parse(text: &str) -> Result<Self, serde_yaml::Error> {
        // An empty file is an empty map, so that the errors name what is missing.
        match serde_yaml::from_str(text)? {
            Self::Null => Ok(Self::Map(Vec::new())),
            tree => Ok(tree),
        }
    }

    /// The value of a key, the last one where it is repeated.
    pub fn get(&self, key: &str) -> Option<(Step, &Self)> {
        match self {
            Self::Map(entries) => {
                entries.iter().enumerate().rfind(|(_, (name, _))| name == key).map(|(step, (_, value))| (step, value))
            }
            _ => None,
        }
    }

    /// Places of keys that stand in their map already, with the key.
    pub fn duplicates(&self) -> Vec<(Place, String)> {
        let mut found = Vec::new();
        self.walk(&mut Vec::new(), &mut |node, steps| {
            if let Self::Map(entries) = node {
                let mut seen = std::collections::HashSet::new();
                for (step, (key, _)) in entries.iter().enumerate() {
                    if !seen.insert(key) {
                        let steps = steps.iter().copied().chain([step]).collect();
                        found.push((Place { steps, key: true }, key.clone()));
                    }
                }
            }
        });
        found
    }

    fn walk(&self, steps: &mut Vec<Step>, visit: &mut impl FnMut(&Self, &[Step])) {
        visit(self, steps);
        let children: Box<dyn Iterator<Item = &Self>> = match self {
            Self::Seq(items) => Box::new(items.iter()),
            Self::Map(entries) => Box::new(entries.iter().map(|(_, value)| value)),
            _ => return,
        };
        for (step, child) in children.enumerate() {
            steps.push(step);
            child.walk(steps, visit);
            steps.pop();
        }
    }

    /// Changes each string value in place; the callback learns where it stands.
    pub fn each_text(&mut self, steps: &mut Vec<Step>, change: &mut impl FnMut(&mut String, &[Step])) {
        let children: Box<dyn Iterator<Item = &mut Self>> = match self {
            Self::Text(text) => return change(text, steps),
            Self::Seq(items) => Box::new(items.iter_mut()),
            Self::Map(entries) => Box::new(entries.iter_mut().map(|(_, value)| value)),
            _ => return,
        };
        for (step, child) in children.enumerate() {
            steps.push(step);
            child.each_text(steps, change);
            steps.pop();
        }
    }
}

impl Tree {
    fn unexpected(&self) -> de::Unexpected<'_> {
        match self {
            Self::Null => de::Unexpected::Unit,
            Self::Bool(value) => de::Unexpected::Bool(*value),
            Self::Int(value) => de::Unexpected::Signed(*value),
            Self::Float(value) => de::Unexpected::Float(*value),
            Self::Text(text) => de::Unexpected::Str(text),
            Self::Seq(_) => de::Unexpected::Seq,
            Self::Map(_) => de::Unexpected::Map,
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Build;
        impl<'de> Visitor<'de> for Build {
            type Value = Tree;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("plain YAML without tags")
            }
            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Null)
            }
            fn visit_none<E>(self) -> Result<Tree, E> {
                Ok(Tree::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
                Ok(Tree::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
                Ok(Tree::Int(value))
            }
            #[allow(clippy::cast_precision_loss, reason = "no key takes a number this large")]
            fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
                Ok(i64::try_from(value).map_or(Tree::Float(value as f64), Tree::Int))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
                Ok(Tree::Float(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
                Ok(Tree::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Tree::Seq(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Key>()? {
                    entries.push((key.0, map.next_value()?));
                }
                Ok(Tree::Map(entries))
            }
        }
        deserializer.deserialize_any(Build)
    }
}

/// A key: any scalar, as text. Which keys are known is for the types to say.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Tree::deserialize(deserializer)? {
            Tree::Text(text) => Ok(Self(text)),
            Tree::Bool(value) => Ok(Self(value.to_string())),
            Tree::Int(value) => Ok(Self(value.to_string())),
            Tree::Float(value) => Ok(Self(value.to_string())),
            Tree::Null => Ok(Self("null".to_owned())),
            Tree::Seq(_) | Tree::Map(_) => Err(de::Error::custom("a key must be plain text, not a list or a map")),
        }
    }
}

/// The error of a typed read: serde's own, the path is kept beside it.
type Error = value::Error;

impl<'de> Deserializer<'de> for &'de Tree {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Null => visitor.visit_unit(),
            Tree::Bool(value) => visitor.visit_bool(*value),
            Tree::Int(value) => visitor.visit_i64(*value),
            Tree::Float(value) => visitor.visit_f64(*value),
            Tree::Text(text) => visitor.visit_borrowed_str(text),
            Tree::Seq(items) => {
                let mut items = value::SeqDeserializer::new(items.iter());
                let value = visitor.visit_seq(&mut items)?;
                items.end()?;
                Ok(value)
            }
            Tree::Map(entries) => {
                let mut entries = value::MapDeserializer::new(entries.iter().map(|(key, value)| (key.as_str(), value)));
                let value = visitor.visit_map(&mut entries)?;
                entries.end()?;
                Ok(value)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Tree::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            Tree::Text(text) => {
                let deserializer: value::StrDeserializer<'_, Error> = text.as_str().into_deserializer();
                deserializer.deserialize_enum(name, variants, visitor)
            }
            _ => Err(de::Error::invalid_type(self.unexpected(), &"a word")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for &'de Tree {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

/// Line and column, both from 1, of a place; the file's start where it cannot be found.
pub(super) fn locate(text: &str, place: &Place) -> (usize, usize) {
    let seed = Walk { steps: &place.steps, key: place.key };
    let failed = seed.deserialize(serde_yaml::Deserializer::from_str(text));
    failed.err().and_then(|error| error.location()).map_or((1, 1), |location| (location.line(), location.column()))
}

/// Walks down to a place and fails there, so that the parser marks the error with its location.
#[derive(Clone, Copy)]
struct Walk<'a> {
    steps: &'a [Step],
    key: bool,
}

impl Walk<'_> {
    fn here<E: de::Error>() -> E {
        E::custom("here")
    }

    fn down(self) -> Self {
        Self { steps: &self.steps[1..], key: self.key }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a node")
    }
    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Err(Self::here())
    }
    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        Err(Self::here())
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        Err(Self::here())
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        Err(Self::here())
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        Err(Self::here())
    }
    fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
        Err(Self::here())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Some(&step) = self.steps.first() else {
            return Err(Self::here());
        };
        for _ in 0..step {
            seq.next_element::<de::IgnoredAny>()?;
        }
        seq.next_element_seed(self.down())?;
        Err(Self::here())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some(&step) = self.steps.first() else {
            return Err(Self::here());
        };
        for _ in 0..step {
            map.next_entry::<de::IgnoredAny, de::IgnoredAny>()?;
        }
        if self.key && self.steps.len() == 1 {
            map.next_key_seed(Walk { steps: &[], key: false })?;
            return Err(Self::here());
        }
        map.next_key::<de::IgnoredAny>()?;
        map.next_value_seed(self.down())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a: 1\nb:\n  - x: {y: [1, 2]}\n    z: 'quoted'\n  - plain\nb: again\n";

    fn place(steps: &[Step], key: bool) -> Place {
        Place { steps: steps.to_vec(), key }
    }

    #[test]
    fn every_node_is_found() {
        assert_eq!(locate(TEXT, &place(&[0], true)), (1, 1));
        assert_eq!(locate(TEXT, &place(&[0], false)), (1, 4));
        assert_eq!(locate(TEXT, &place(&[1, 0, 0, 0, 1], false)), (3, 16));
        assert_eq!(locate(TEXT, &place(&[1, 0, 1], true)), (4, 5));
        assert_eq!(locate(TEXT, &place(&[1, 0, 1], false)), (4, 8));
        assert_eq!(locate(TEXT, &place(&[1, 1], false)), (5, 5));
        assert_eq!(locate(TEXT, &place(&[2], true)), (6, 1));
    }

    #[test]
    fn duplicates_are_kept_and_found() {
        let tree = Tree::parse(TEXT).unwrap();
        assert_eq!(tree.duplicates(), [(place(&[2], true), "b".to_owned())]);
    }
}
