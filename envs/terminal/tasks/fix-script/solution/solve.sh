#!/bin/sh
cat >/app/sum.sh <<'END'
#!/bin/sh
total=0
while read -r n; do
    total=$((total + n))
done <"$1"
echo "$total"
END
