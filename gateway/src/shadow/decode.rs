//! What a body says once its content codings are undone, within a bound. Pure.

use std::io::Read;

use bytes::Bytes;

/// Codings of one body that are undone, at most: more is an attack or a mistake.
const CODINGS: usize = 3;

/// Undoes the codings that `Content-Encoding` names, as far as the result is no larger than `most`. Nothing where that cannot be done.
pub fn decode(codings: &str, body: &Bytes, most: usize) -> Option<Bytes> {
    let codings: Vec<&str> = codings.split(',').map(str::trim).filter(|coding| !coding.is_empty()).collect();
    if codings.len() > CODINGS {
        return None;
    }
    // The last was applied last.
    codings.iter().rev().try_fold(body.clone(), |body, coding| undo(&coding.to_ascii_lowercase(), &body, most))
}

fn undo(coding: &str, body: &Bytes, most: usize) -> Option<Bytes> {
    // A HEAD, a 204: nothing was coded.
    if body.is_empty() {
        return Some(Bytes::new());
    }
    match coding {
        "identity" => Some(body.clone()),
        "gzip" | "x-gzip" => read(flate2::read::MultiGzDecoder::new(&body[..]), most),
        // With the wrapper that the standard asks for, or without, as some send it (RFC 9110 §8.4.1.2).
        "deflate" => read(flate2::read::ZlibDecoder::new(&body[..]), most)
            .or_else(|| read(flate2::read::DeflateDecoder::new(&body[..]), most)),
        "br" => read(brotli_decompressor::Decompressor::new(&body[..], 4096), most),
        "zstd" => read(ruzstd::decoding::StreamingDecoder::new(&body[..]).ok()?, most),
        _ => None,
    }
}

fn read(decoder: impl Read, most: usize) -> Option<Bytes> {
    let mut out = Vec::new();
    let read = decoder.take(most as u64 + 1).read_to_end(&mut out);
    (read.is_ok() && out.len() <= most).then(|| out.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(text: &[u8]) -> Bytes {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap().into()
    }

    #[test]
    fn codings_are_undone_within_a_bound() {
        let text = br#"{"a": 1}"#.repeat(100);
        assert_eq!(decode("gzip", &gzip(&text), 10_000).unwrap(), text);
        assert_eq!(decode("GZIP, identity", &gzip(&text), 10_000).unwrap(), text);
        assert_eq!(decode("gzip, gzip", &gzip(&gzip(&text)), 10_000).unwrap(), text);
        assert_eq!(decode("", &Bytes::from_static(b"x"), 10).unwrap(), "x");
        // printf hello | brotli | xxd, and the same with zstd
        let br: &[u8] = &[0x0b, 0x02, 0x80, b'h', b'e', b'l', b'l', b'o', 0x03];
        assert_eq!(decode("br", &Bytes::from_static(br), 10).unwrap(), "hello");
        let zstd: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x05, 0x29, 0, 0, b'h', b'e', b'l', b'l', b'o'];
        assert_eq!(decode("zstd", &Bytes::from_static(zstd), 10).unwrap(), "hello");
        // A bomb, a lie, a word that nobody knows, too many.
        assert_eq!(decode("gzip", &gzip(&vec![0; 1 << 20]), 1 << 19), None);
        assert_eq!(decode("gzip", &Bytes::from_static(b"plain"), 10), None);
        assert_eq!(decode("lzma", &Bytes::from_static(b"plain"), 10), None);
        assert_eq!(decode("gzip, gzip, gzip, gzip", &gzip(&text), 10_000), None);
    }
}
