// A box to write in, with suggestions below it: the search of the page, and the two query boxes.
import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";

export interface Suggestion {
  id: string;
  text: ComponentChildren;
  detail?: string;
  /** What happens when it is chosen: a new text and cursor, or something else. */
  apply: () => { text: string; cursor: number } | void;
}

export function Suggest({ value, label, placeholder, suggestions, onInput, onEnter, mono = false, class: className = "", inputId }: {
  value: string; label: string; placeholder?: string; suggestions: Suggestion[]; onInput: (text: string, cursor: number) => void; onEnter: (text: string) => void;
  mono?: boolean; class?: string; inputId?: string;
}) {
  const [open, setOpen] = useState(false);
  const [at, setAt] = useState(-1);
  const input = useRef<HTMLInputElement>(null);
  const list = useId(), id = inputId ?? list + "i";
  const wanted = useRef<number | undefined>(undefined);
  useEffect(() => setAt(-1), [suggestions.map((s) => s.id).join("\n")]);
  useEffect(() => {
    if (wanted.current !== undefined && input.current) {
      input.current.setSelectionRange(wanted.current, wanted.current);
      wanted.current = undefined;
    }
  }, [value]);
  const shown = open && suggestions.length > 0;
  const choose = (s: Suggestion) => {
    const next = s.apply();
    if (next) {
      wanted.current = next.cursor;
      onInput(next.text, next.cursor);
      input.current?.focus();
    } else {
      setOpen(false);
      input.current?.blur();
    }
  };
  return (
    <div class={`suggest ${mono ? "mono" : ""} ${className}`}>
      <input
        ref={input} id={id} value={value} placeholder={placeholder} aria-label={label} role="combobox" aria-expanded={shown} aria-controls={list} aria-autocomplete="list"
        aria-activedescendant={shown && at >= 0 ? `${list}-${at}` : undefined} autocomplete="off" autocapitalize="off" spellcheck={false}
        onInput={(e) => {
          setOpen(true);
          onInput(e.currentTarget.value, e.currentTarget.selectionStart ?? e.currentTarget.value.length);
        }}
        onFocus={(e) => {
          onInput(e.currentTarget.value, e.currentTarget.selectionStart ?? 0);
        }}
        onClick={(e) => {
          setOpen(true);
          onInput(e.currentTarget.value, e.currentTarget.selectionStart ?? 0);
        }}
        onBlur={() => setOpen(false)}
        onKeyDown={(e) => {
          switch (e.key) {
            case "ArrowDown":
            case "ArrowUp":
              if (suggestions.length === 0) return;
              e.preventDefault();
              if (!shown) setOpen(true);
              else setAt((at + (e.key === "ArrowDown" ? 1 : -1) + suggestions.length + (at < 0 && e.key === "ArrowUp" ? 1 : 0)) % suggestions.length);
              return;
            case "Enter":
              e.preventDefault();
              if (shown && at >= 0) choose(suggestions[at]!);
              else {
                setOpen(false);
                onEnter(e.currentTarget.value);
              }
              return;
            case "Tab":
              if (shown && at >= 0) {
                e.preventDefault();
                choose(suggestions[at]!);
              }
              return;
            case "Escape":
              if (shown) {
                e.stopPropagation();
                setOpen(false);
              } else e.currentTarget.blur();
          }
        }}
      />
      <ul id={list} role="listbox" aria-label={`${label}: suggestions`} hidden={!shown}>
        {shown && suggestions.map((s, i) => (
          <li key={s.id} id={`${list}-${i}`} role="option" aria-selected={i === at} onPointerDown={(e) => { e.preventDefault(); choose(s); }}>
            <span>{s.text}</span>
            {s.detail && <small>{s.detail}</small>}
          </li>
        ))}
      </ul>
    </div>
  );
}
