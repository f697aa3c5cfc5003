"""Tell by its first bytes what a file is: a picture, or something that people take for one.

One table serves two messages: what the file of a failed image is, and what to do with an input that holds no picture.
"""

from __future__ import annotations

import codecs
import os
import re
from typing import NamedTuple

from featcli.system.files import open_regular

START = 512  # bytes of a file that the table needs: a tar has its mark at 257
XML, COMMENT = b"<?xml", re.compile(rb"<!--.*?-->\s*", re.DOTALL)

# First bytes of formats that are read. A header can be so damaged that Pillow no longer knows its format.
KNOWN = (
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"\x89PNG", 0, "PNG"),
    (b"WEBP", 8, "WebP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"GIF8", 0, "GIF"),
    (b"ftypavif", 4, "AVIF"),
    (b"ftypavis", 4, "AVIF"),
    (b"jP  ", 4, "JPEG 2000"),
    (b"\xff\x4f\xff\x51", 0, "JPEG 2000"),
    (b"\0\0\1\0", 0, "ICO"),
)

PICTURE = "picture"  # of a format that is not read
ARCHIVE, PACKED, TAR, TABLE, ARRAY, VIDEO, AUDIO, DOCUMENT, TEXT, DATA = (
    "archive", "packed", "tar", "table", "array", "video", "audio", "document", "text", "data",
)  # fmt: skip
BY_PLUGIN = ("HEIF", "JXL")  # formats that a plugin of Pillow reads if it is installed
HINTS = {
    PICTURE: "convert it to JPEG or PNG",
    ARCHIVE: "unpack it and name the folder, or pack its pictures into a plain .tar",
    PACKED: "unpack it: pictures are compressed already, and plain .tar files are the only archives that are read",
    TAR: "give the tar file as an INPUT, under a name that ends in .tar",
    TABLE: "if it has a column of paths, give it with --table; pictures inside it belong into a folder or a .tar",
    ARRAY: "write each picture in it to a file, such as PNG, and name the folder",
    VIDEO: "write its frames to a folder first: ffmpeg -i VIDEO FOLDER/%06d.png",
    AUDIO: "leave it out",
    DOCUMENT: "write its pages or its pictures to a folder first: pdftoppm -png, pdfimages -all",
    TEXT: "if it lists the names of pictures, give it with --files-from",
    DATA: "if it is a table with a column of paths, give it with --table; else leave it out",
}

# Files that nothing here reads: (first bytes, their offset, what it is, its kind). A picture is called by its format,
# anything else in the words of a message.
FOREIGN = (
    (b"ftyphei", 4, "HEIF", PICTURE),
    (b"ftyphev", 4, "HEIF", PICTURE),
    (b"ftypmif1", 4, "HEIF", PICTURE),
    (b"\xff\x0a", 0, "JXL", PICTURE),
    (b"JXL ", 4, "JXL", PICTURE),
    (b"%!PS", 0, "PostScript", PICTURE),
    (b"\xc5\xd0\xd3\xc6", 0, "PostScript", PICTURE),
    (b"8BPS", 0, "Photoshop (PSD)", PICTURE),
    (b"gimp xcf", 0, "GIMP (XCF)", PICTURE),
    (b"v/1\x01", 0, "OpenEXR", PICTURE),
    (b"#?RADIANCE", 0, "Radiance HDR", PICTURE),
    (b"#?RGBE", 0, "Radiance HDR", PICTURE),
    (b"DICM", 128, "DICOM", PICTURE),
    (b"SIMPLE  =", 0, "FITS", PICTURE),
    (b"\x5c\x01\0\0", 0, "NIfTI", PICTURE),
    (b"\0\0\x01\x5c", 0, "NIfTI", PICTURE),
    (b"NRRD000", 0, "NRRD", PICTURE),
    (b"DDS ", 0, "DDS", PICTURE),
    (b"\xabKTX ", 0, "KTX", PICTURE),
    (b"qoif", 0, "QOI", PICTURE),
    (b"P7\n", 0, "PAM", PICTURE),
    (b"PF\n", 0, "PFM of colours", PICTURE),
    (b"FLIF", 0, "FLIF", PICTURE),
    (b"BPG\xfb", 0, "BPG", PICTURE),
    (b"icns", 0, "ICNS", PICTURE),
    (b"\xff\xd8\xff\xf7", 0, "JPEG-LS", PICTURE),
    (b"II\xbc\x01", 0, "JPEG XR", PICTURE),
    (b"\x01\xda", 0, "SGI", PICTURE),
    (b"\n\x03\x01", 0, "PCX", PICTURE),
    (b"\n\x05\x01", 0, "PCX", PICTURE),
    (b"\x59\xa6\x6a\x95", 0, "Sun raster", PICTURE),
    (b"Image type:", 0, "IM", PICTURE),
    (b"! XPM2", 0, "XPM", PICTURE),
    (b"/* XPM */", 0, "XPM", PICTURE),
    (b"\xd7\xcd\xc6\x9a", 0, "WMF", PICTURE),
    (b" EMF", 40, "EMF", PICTURE),
    (b"AT&TFORM", 0, "DjVu", DOCUMENT),
    (b"ftypcrx", 4, "the raw format of a camera (CR3)", PICTURE),
    (b"FUJIFILMCCD-RAW", 0, "the raw format of a camera (RAF)", PICTURE),
    (b"IIRO", 0, "the raw format of a camera (ORF)", PICTURE),
    (b"IIRS", 0, "the raw format of a camera (ORF)", PICTURE),
    (b"MMOR", 0, "the raw format of a camera (ORF)", PICTURE),
    (b"IIU\0", 0, "the raw format of a camera (RW2)", PICTURE),
    (b"FOVb", 0, "the raw format of a camera (X3F)", PICTURE),
    (b"\0MRM", 0, "the raw format of a camera (MRW)", PICTURE),
    (b"<svg", 0, "SVG", PICTURE),
    (XML, 0, "SVG", PICTURE),  # if the text says so
    (b"%PDF", 0, "PDF", DOCUMENT),
    (b"PK\x03\x04", 0, "a ZIP archive", ARCHIVE),
    (b"PK\x05\x06", 0, "an empty ZIP archive", ARCHIVE),
    (b"PK\x07\x08", 0, "a ZIP archive in pieces", ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", ARCHIVE),
    (b"Rar!\x1a\x07", 0, "a RAR archive", ARCHIVE),
    (b"\x1f\x8b", 0, "a file packed by gzip", PACKED),
    (b"BZh", 0, "a file packed by bzip2", PACKED),
    (b"\xfd7zXZ\0", 0, "a file packed by xz", PACKED),
    (b"\x28\xb5\x2f\xfd", 0, "a file packed by zstd", PACKED),
    (b"\x04\x22\x4d\x18", 0, "a file packed by lz4", PACKED),
    (b"ustar", 257, "a tar file", TAR),
    (b"PAR1", 0, "a Parquet table", TABLE),
    (b"ARROW1", 0, "an Arrow table", TABLE),
    (b"FEA1", 0, "a Feather table", TABLE),
    (b"Obj\x01", 0, "an Avro table", TABLE),
    (b"SQLite format 3\0", 0, "an SQLite database", TABLE),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", ARRAY),
    (b"\x93NUMPY", 0, "a NumPy array", ARRAY),
    (b"MATLAB 5.0 MAT-file", 0, "a MATLAB file", ARRAY),
    (b"MATLAB 7.3 MAT-file", 0, "a MATLAB file", ARRAY),
    (b"\xde\xc0\xef\xbe", 16, "an LMDB database", ARRAY),
    (b"CDF\x01", 0, "a NetCDF file", ARRAY),
    (b"CDF\x02", 0, "a NetCDF file", ARRAY),
    (b"\x80\x02", 0, "a Python pickle, as torch.save writes", ARRAY),
    (b"\x80\x03", 0, "a Python pickle", ARRAY),
    (b"\x80\x04", 0, "a Python pickle", ARRAY),
    (b"\x80\x05", 0, "a Python pickle", ARRAY),
    (b'\0\0{"', 6, "a safetensors file", ARRAY),
    (b"ftypiso", 4, "a video (MP4)", VIDEO),
    (b"ftypmp4", 4, "a video (MP4)", VIDEO),
    (b"ftypavc1", 4, "a video (MP4)", VIDEO),
    (b"ftypdash", 4, "a video (MP4)", VIDEO),
    (b"ftypM4", 4, "a video (MP4)", VIDEO),
    (b"ftypMSNV", 4, "a video (MP4)", VIDEO),
    (b"ftyp3g", 4, "a video (3GP)", VIDEO),
    (b"ftypf4v", 4, "a video (F4V)", VIDEO),
    (b"ftypqt", 4, "a video (QuickTime)", VIDEO),
    (b"moov", 4, "a video (QuickTime)", VIDEO),
    (b"mdat", 4, "a video (QuickTime)", VIDEO),
    (b"\x1a\x45\xdf\xa3", 0, "a video (Matroska or WebM)", VIDEO),
    (b"AVI ", 8, "a video (AVI)", VIDEO),
    (b"FLV\x01", 0, "a video (FLV)", VIDEO),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "a video (WMV)", VIDEO),
    (b"\0\0\x01\xba", 0, "a video (MPEG)", VIDEO),
    (b"\0\0\x01\xb3", 0, "a video (MPEG)", VIDEO),
    (b"OggS", 0, "a video or a sound (Ogg)", VIDEO),
    (b"WAVE", 8, "a sound (WAV)", AUDIO),
    (b"fLaC", 0, "a sound (FLAC)", AUDIO),
    (b"ID3\x03", 0, "a sound (MP3)", AUDIO),
    (b"ID3\x04", 0, "a sound (MP3)", AUDIO),
)

# Suffixes of files that have no such mark: (suffixes, what it is, its kind).
_BY_SUFFIX = (
    (".svg .svgz", "SVG", PICTURE),
    (".psd .psb", "Photoshop (PSD)", PICTURE),
    (".xcf", "GIMP (XCF)", PICTURE),
    (".exr", "OpenEXR", PICTURE),
    (".hdr", "Radiance HDR", PICTURE),
    (".dcm .dicom", "DICOM", PICTURE),
    (".fits .fit .fts", "FITS", PICTURE),
    (".nii .nrrd .mha .mhd", "a volume of medical pictures", PICTURE),
    (".eps .ps .ai", "PostScript", PICTURE),
    (".dds .ktx .qoi .flif .bpg .pcx .sgi .xpm .wmf .emf .icns .jxr .wdp .jls .djvu", "a format of pictures", PICTURE),
    (".cr3 .raf .orf .rw2 .x3f .mrw", "the raw format of a camera", PICTURE),
    (".pdf", "PDF", DOCUMENT),
    (".zip .7z .rar", "an archive", ARCHIVE),
    (".gz .tgz .bz2 .tbz2 .xz .txz .zst .lz4", "a packed file", PACKED),
    (".parquet .arrow .feather .orc .avro .xlsx .sqlite", "a table", TABLE),
    (".npy .npz .h5 .hdf5 .mat .pt .pth .pkl .pickle .safetensors .mdb .lmdb .tfrecord .tfrecords .nc .zarr",
     "a file of arrays", ARRAY),
    (".mp4 .m4v .mov .mkv .webm .avi .flv .wmv .mpg .mpeg .m2ts .3gp .ogv", "a video", VIDEO),
    (".wav .mp3 .flac .ogg .m4a .aac", "a sound", AUDIO),
    (".csv .tsv", "a table (CSV)", DATA),
    (".json .jsonl .ndjson", "JSON", DATA),
    (".yaml .yml .toml", "text", DATA),
    (".xml", "XML", DATA),
    (".html .htm", "an HTML page", DATA),
    (".txt .lst .list", "text", TEXT),
)  # fmt: skip
_SUFFIXES = {suffix: (what, kind) for suffixes, what, kind in _BY_SUFFIX for suffix in suffixes.split()}


class Signature(NamedTuple):
    """What a file is that cannot be read as a picture."""

    what: str
    kind: str

    @property
    def is_picture(self) -> bool:
        """Whether it is a picture nevertheless, of a format that is not read."""
        return self.kind == PICTURE

    @property
    def may_be_read(self) -> bool:
        """Whether it is of a format that a plugin reads."""
        return self.what in BY_PLUGIN

    @property
    def refused(self) -> str:
        """What it is, and that it is not read, for people."""
        return f"it is {self.what}, {'which is not read' if self.is_picture else 'not a picture'}"

    @property
    def is_text(self) -> bool:
        """Whether it is something that servers send in place of a picture."""
        return self.kind in (TEXT, DATA)

    @property
    def hint(self) -> str:
        """What to do with it if it was named as an input."""
        return HINTS.get(self.kind, "")


def known_format(start: bytes) -> str:
    """Return the format that a file begins like, of those that are read; "" for any other file."""
    return next((name for mark, at, name in KNOWN if start.startswith(mark, at)), "")


def foreign(start: bytes, name: str = "") -> Signature | None:
    """Return what a file is that cannot be read as a picture, by its first START bytes; None if they do not tell.

    `name` tells what the bytes cannot, such as what an empty file is, and which kind of ZIP archive or text a file is.
    """
    by_name = by_suffix(os.path.splitext(name)[1])
    words = COMMENT.sub(b"", start.removeprefix(codecs.BOM_UTF8).lstrip(), count=9).lstrip()
    for mark, at, what, kind in FOREIGN:
        if not start.startswith(mark, at) and not (kind == PICTURE and at == 0 and words.startswith(mark)):
            continue
        if mark == XML and b"svg" not in start.lower() and not name.lower().endswith(".svg"):
            return Signature("XML", DATA)
        if kind == ARCHIVE and by_name and by_name.kind in (ARRAY, TABLE):
            return Signature(what, by_name.kind)  # .npz, .pt and .xlsx are ZIP archives
        return Signature(what, kind)
    if known_format(start) or _is_netpbm(start) or _is_bmp(start):
        return None
    return _text(words, by_name) if _is_text(start) else by_name


def foreign_file(path: str) -> Signature | None:
    """Return what a file is that cannot be read as a picture, by its first bytes and its name; None if unknown.

    A file that cannot be opened is known by its name alone. Why it cannot be opened is said when it is read.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            start = file.read(START)
    except (OSError, ValueError):
        start = b""
    return foreign(start, path)


def by_suffix(suffix: str) -> Signature | None:
    """Return what files with a suffix are if they are no pictures; else None."""
    found = _SUFFIXES.get(suffix.lower())
    return Signature(*found) if found else None


def _is_netpbm(start: bytes) -> bool:
    """Return whether it is a PPM or a relative of it. Some files with such a beginning are text."""
    return start[:1] == b"P" and start[1:2] in b"1234567fF" and start[2:3] in b" \t\r\n#"


def _is_bmp(start: bytes) -> bool:
    """Return whether it is a BMP. Its mark can also begin a word."""
    return start.startswith(b"BM") and start[6:10] == bytes(4)


def _is_text(start: bytes) -> bool:
    """Return whether the bytes are text without control characters. The last character may be cut off."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return bool(text) and not any(char < " " and char not in "\t\r\n\f" for char in text)


def _text(words: bytes, by_name: Signature | None) -> Signature:
    start = words[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return Signature("an HTML page", DATA)
    if by_name is not None and (by_name.is_text or by_name.is_picture):
        return by_name
    return Signature("JSON", DATA) if start.startswith((b"{", b"[")) else Signature("text", TEXT)
